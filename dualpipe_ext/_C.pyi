"""csrc/bindings.cpp for type checkers: addresses of memory, streams and events are integers."""

from collections.abc import Sequence

MAX_RANKS: int
MAX_TOPK: int
MAX_LOCAL_EXPERTS: int
ROW_ALIGNMENT: int
OPERATIONS: tuple[tuple[str, str], ...]  # what, channel
PHASES: dict[int, str]
FAULT_ROWS_NEEDED: int
FAULT_BAD_INDEX: int
HEADER_WORDS: int
FAULT_WORDS: int
LINK_FAULT_WORDS: int

class Link:
    def __init__(
        self,
        *,
        device: int,
        peer: int,
        sends: bool,
        theirs: int,
        mine: int,
        abort: int,
        fault: int,
        timeout: float,
    ) -> None: ...
    def move(
        self,
        expected: int,
        copies: Sequence[tuple[int, int, int]],  # (to, from, bytes)
        sequence: int,
        stream: int,
        /,
    ) -> None: ...

class Exchange:
    def __init__(
        self,
        *,
        rank: int,
        ranks: int,
        device: int,
        hidden: int,
        element_bytes: int,
        experts: int,
        topk: int,
        max_tokens: int,
        max_rows: int,
        unique: bool,
        timeout: float,
        fault: int,
        peers: Sequence[int],
    ) -> None: ...
    @property
    def symmetric_bytes(self) -> int: ...
    @property
    def plan_elements(self) -> int: ...
    def plan_parts(self) -> dict[str, tuple[int, int]]: ...  # first element, elements
    def channel_parts(self, channel: int, /) -> dict[str, tuple[int, int]]: ...  # first byte, bytes
    def plan(
        self, topk_idx: int, tokens: int, plan: int, header: int, sms: int, stream: int, /
    ) -> None: ...
    def stage(
        self, channel: int, x: int, topk_weight: int, tokens: int, stream: int, /
    ) -> None: ...
    def dispatch(
        self,
        channel: int,
        x: int,
        topk_weight: int,
        tokens: int,
        plan: int,
        rows: int,
        row_weight: int,
        sms: int,
        stream: int,
        /,
    ) -> None: ...
    def push(
        self,
        channel: int,
        x: int,
        topk_weight: int,
        fp8: bool,
        pack: bool,
        tokens: int,
        plan: int,
        sms: int,
        stream: int,
        /,
    ) -> None: ...
    def pull(
        self,
        channel: int,
        topk_idx: int,
        tokens: int,
        plan: int,
        y: int,
        topk_weight: int,
        sms: int,
        stream: int,
        /,
    ) -> None: ...
    def copy(
        self,
        channel: int,
        combine: bool,
        weights: bool,
        fp8: bool,
        rows: Sequence[int],
        copy_streams: Sequence[int],
        events: Sequence[int],
        stream: int,
        /,
    ) -> None: ...
    def wait_outbox(self, channel: int, stream: int, /) -> None: ...
    def push_ceiling(self, x: int, tokens: int, rows: int, sms: int, stream: int, /) -> None: ...
    def combine(
        self,
        channel: int,
        rows: int,
        row_weight: int,
        topk_idx: int,
        tokens: int,
        plan: int,
        y: int,
        topk_weight: int,
        sms: int,
        stream: int,
        /,
    ) -> None: ...
