"""The links between the tiers of a simulated device: when each copy is done."""

from __future__ import annotations

from collections import deque

from agentserve.config import LoraConfig, TierConfig, TieringConfig
from agentserve.core.adapters import AdapterLoad, AdapterLoadOutput, TransferOrder
from agentserve.core.transfers import Tier, Transfer, TransferOutput


class SimulatedLinks:
    """A link for each tier below the device, with two directions that do not disturb each other.

    A copy takes the latency of its tier and its bytes over the bandwidth; copies of one direction follow each other.
    Not modelled: links that share a bus, and the load of copies on the device's memory.
    """

    def __init__(self, tiering: TieringConfig | None, num_blocks: int, lora: LoraConfig | None = None) -> None:
        """`tiering`: None for a device without tiers. `num_blocks`: of the device. `lora`: None if it has no slots."""
        tiers = () if tiering is None else tiering.tiers
        self._sizes = {Tier.DEVICE: num_blocks, **{Tier(tier.name): tier.num_blocks for tier in tiers}}
        self._tiers: dict[Tier, TierConfig] = {Tier(tier.name): tier for tier in tiers}
        self._in_flight: dict[tuple[Tier, bool], deque[TransferOutput]] = {}
        self._lora = lora
        self._adapter_loads: deque[AdapterLoadOutput] = deque()

    @property
    def tiers(self) -> tuple[Tier, ...]:
        """The device and all below it."""
        return (Tier.DEVICE, *self._tiers)

    def submit(self, transfer: TransferOrder, now_ns: int) -> None:
        """Starts a copy behind those of its link. Raises RuntimeError for a tier or a slot that there is not."""
        if isinstance(transfer, AdapterLoad):
            self._submit_load(transfer, now_ns)
            return
        tier, goes_up = transfer.link
        config = self._tiers.get(tier)
        if config is None:
            raise RuntimeError(f"there is no {tier} tier")
        link = self._in_flight.setdefault((tier, goes_up), deque())
        started_ns = max(now_ns, link[-1].finished_ns) if link else now_ns
        finished_ns = started_ns + config.duration_ns(transfer.num_bytes, reads=goes_up)
        link.append(TransferOutput(transfer.transfer_id, started_ns, finished_ns, self._error(transfer)))

    def _submit_load(self, load: AdapterLoad, now_ns: int) -> None:
        """Adapters have a link of their own, as copies of another direction have."""
        if self._lora is None or not 0 <= load.slot < self._lora.max_resident:
            raise RuntimeError(f"there is no slot {load.slot} for the adapter {load.adapter}")
        loads = self._adapter_loads
        started_ns = max(now_ns, loads[-1].finished_ns) if loads else now_ns
        finished_ns = started_ns + self._lora.duration_ns(load.num_bytes)
        loads.append(AdapterLoadOutput(load.load_id, started_ns, finished_ns))

    def poll(self, now_ns: int) -> list[TransferOutput | AdapterLoadOutput]:
        """What is done by now: copies between tiers in the order of finishing, then those of adapters."""
        if not (self._in_flight or self._adapter_loads):
            return []
        done: list[TransferOutput] = []
        for link in self._in_flight.values():
            while link and link[0].finished_ns <= now_ns:
                done.append(link.popleft())
        done.sort(key=lambda output: (output.finished_ns, output.transfer_id))
        loads = self._adapter_loads
        loaded = []
        while loads and loads[0].finished_ns <= now_ns:
            loaded.append(loads.popleft())
        return [*done, *loaded]

    def next_completion_ns(self) -> int | None:
        """When the next copy is done; None if nothing is under way."""
        if not (self._in_flight or self._adapter_loads):
            return None
        links: list[deque[TransferOutput] | deque[AdapterLoadOutput]] = [*self._in_flight.values(), self._adapter_loads]
        return min((link[0].finished_ns for link in links if link), default=None)

    def clear(self) -> None:
        """Forgets what is under way."""
        self._in_flight.clear()
        self._adapter_loads.clear()

    def _error(self, transfer: Transfer) -> str | None:
        sides = ((transfer.source, transfer.source_ids), (transfer.destination, transfer.destination_ids))
        for tier, ids in sides:
            if min(ids) < 0 or max(ids) >= self._sizes[tier]:
                return f"transfer {transfer.transfer_id} has a block id outside the {tier} tier"
        return None
