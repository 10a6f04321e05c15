"""Which kind of work a request is at the moment, and which lane it belongs to."""

from __future__ import annotations

from agentserve.core.batch import Lane
from agentserve.core.request import Request, WorkClass


def classify(request: Request, min_cached_tokens: int) -> WorkClass:
    """The class of the request's next chunk (AgentServe, section 3).

    All known tokens computed but the last one: decode. A cached prefix of at least `min_cached_tokens`: resume prefill.
    Everything else, a prefix too short to matter included: cold prefill.
    """
    if not request.is_prefilling:
        return WorkClass.DECODE
    if request.num_cached_at_admission >= max(1, min_cached_tokens):
        return WorkClass.RESUME_PREFILL
    return WorkClass.COLD_PREFILL


def lane_of(request: Request, work_class: WorkClass, resume_limit: int) -> Lane:
    """The lane for the request's next chunk.

    A resume prefill joins the decode lane when what was missing at its admission is at most `resume_limit` tokens;
    it stays in its lane while it shrinks, since both numbers are fixed at admission.
    """
    if work_class is WorkClass.DECODE:
        return Lane.DECODE
    missing = request.prefill_target - request.num_cached_at_admission
    if work_class is WorkClass.RESUME_PREFILL and missing <= resume_limit:
        return Lane.DECODE
    return Lane.PREFILL
