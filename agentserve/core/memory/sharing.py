"""Blocks that several sessions use, for policies that rate them by their users (ScaleSim, section 4.2).

The blocks that the same sessions use form one group. It is worth what it is worth to the user that values it most: with
invocation distances, the minimum of the users' distances. Each session knows the groups that it is in, so a new rating
of a session reaches them at once: O(groups on its path * users), both bounded.
"""

from __future__ import annotations

from collections.abc import Iterator
from weakref import WeakValueDictionary

from agentserve.core.memory.eviction import EvictionGroup, EvictionOrder, Key, SessionBlocks
from agentserve.core.memory.radix import RadixNode

MAX_USERS = 16
"""Users of a group. What more sessions use counts as an anchor: one of so many is always near."""


class UserGroup(EvictionGroup):
    """The blocks that exactly these sessions have used."""

    __slots__ = ("__weakref__", "users")

    def __init__(self, key: Key, sequence: int, users: tuple[SessionBlocks, ...]) -> None:
        super().__init__(key, sequence, is_shared=True)
        self.users = users

    @property
    def best_key(self) -> Key:
        """What it is worth to the user that values it most."""
        return max(user.group.key for user in self.users)


class UserGroups:
    """All groups of several users."""

    def __init__(self, order: EvictionOrder) -> None:
        self._order = order
        self._by_users: WeakValueDictionary[frozenset[str], UserGroup] = WeakValueDictionary()
        self._of_session: dict[str, WeakValueDictionary[int, UserGroup]] = {}
        """By session, then by the group's sequence number: sets of weak references have no order."""

    def group_after(self, node: RadixNode, session: SessionBlocks) -> EvictionGroup:
        """The group of a block once this session has used it, too."""
        group = node.group
        if group is self._order.shared:
            return self._order.shared
        if isinstance(group, UserGroup):
            users = group.users
            if session in users:
                return group
        elif node.user is None or node.user is session:
            return session.group
        else:
            users = (node.user,)
        return self._order.shared if len(users) == MAX_USERS else self._group_of((*users, session))

    def rekeyed(self, session: SessionBlocks) -> None:
        """The private blocks of a session have got another key: so have those that it shares."""
        for group in self._groups_of(session):
            self._order.rekey(group, group.best_key)

    def check_invariants(self) -> None:
        """Raises AssertionError if a group is worth something else than its users say."""
        for group in self._by_users.values():
            assert group.key == group.best_key, "a shared block is not worth what its best user says"

    def _groups_of(self, session: SessionBlocks) -> Iterator[UserGroup]:
        groups = self._of_session.get(session.session_id)
        if groups is None:
            return
        yield from list(groups.values())
        if not groups:
            del self._of_session[session.session_id]

    def _group_of(self, users: tuple[SessionBlocks, ...]) -> UserGroup:
        names = frozenset(user.session_id for user in users)
        found = self._by_users.get(names)
        # A session that was forgotten and came back has other blocks by the same name.
        if found is not None and set(found.users) == set(users):
            return found
        sequence = self._order.new_sequence()
        group = self._by_users[names] = UserGroup(max(user.group.key for user in users), sequence, users)
        for user in users:
            self._of_session.setdefault(user.session_id, WeakValueDictionary())[sequence] = group
        return group
