"""Links over peer memory, on a machine made up of queues: streams, flags and copies in host memory.

Every rank's host queues operations as on GPUs; which queue goes on next is drawn. What cannot be
wrong here is memory ordering, what can: slots, flags, order, lifetimes, and who waits for whom.
"""

import ctypes
import random
import sys
import weakref
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import dualpipe_ext
from dualpipe_ext.errors import PeerTimeoutError
from dualpipe_ext.pipeline import peer_links as pipeline_peer_links
from dualpipe_ext.pipeline.failure import Failure
from dualpipe_ext.pipeline.peer_links import SLOTS, LinkLayout, PeerLinks
from dualpipe_ext.pipeline.schedule import KINDS, build_schedule
from dualpipe_ext.pipeline.simulate import Times, simulate
from dualpipe_ext.pipeline.transfers import Transfers, incoming_bytes

POISON = 77


class StuckError(Exception):
    """No host and no queue can go on."""


class Queue:
    """Operations in order, each tried until it returns something else than False."""

    def __init__(self):
        self.operations, self.done = [], 0

    @property
    def empty(self):
        return self.done == len(self.operations)

    def advance(self):
        if self.empty or self.operations[self.done]() is False:
            return False
        self.operations[self.done] = None
        self.done += 1
        return True


class Stream:
    def __init__(self, queue, number):
        self.queue, self.cuda_stream = queue, number

    def record_event(self):
        queue, count = self.queue, len(self.queue.operations)
        return SimpleNamespace(query=lambda: queue.done >= count)

    def wait_event(self, event):
        self.queue.operations.append(event.query)

    def wait_stream(self, other):
        self.wait_event(other.record_event())


class Machine:
    """`serial`: all streams of a rank share one queue, as with CUDA_DEVICE_MAX_CONNECTIONS=1."""

    def __init__(self, ranks, serial):
        self.serial, self.streams, self.memories = serial, [], []
        self.compute = [self.stream(rank, Queue()) for rank in range(ranks)]

    def stream(self, rank, queue=None):
        if queue is None:
            queue = self.compute[rank].queue if self.serial else Queue()
        self.streams.append(Stream(queue, len(self.streams)))
        return self.streams[-1]

    def memory(self, _, nbytes, __):
        """Alike for all ranks: they ask one after another and get the same addresses."""
        if not self.memories:
            ranks = len(self.compute)
            self.memories = [torch.zeros(nbytes, dtype=torch.uint8) for _ in range(ranks)]
        assert len(self.memories[0]) == nbytes
        return SimpleNamespace(pointers=[buffer.data_ptr() for buffer in self.memories])

    def link(self, *, device, peer, sends, theirs, mine, abort, fault, timeout):
        def move(expected, copies, sequence, stream):
            add = self.streams[stream].queue.operations.append
            if expected:
                add(lambda: ctypes.c_uint64.from_address(theirs).value >= expected)
            for to, source, nbytes in copies:
                add(lambda to=to, source=source, n=nbytes: ctypes.memmove(to, source, n))
            add(lambda: setattr(ctypes.c_uint64.from_address(mine), "value", sequence))

        return SimpleNamespace(move=move)

    def install(self, patch):
        fake = SimpleNamespace(Link=self.link, LINK_FAULT_WORDS=5)
        patch.setitem(sys.modules, "dualpipe_ext._C", fake)
        patch.setattr(dualpipe_ext, "_C", fake, raising=False)
        patch.setattr(pipeline_peer_links, "PeerMemory", self.memory)
        patch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor)
        cuda = SimpleNamespace(
            Stream=lambda device, priority: self.stream(device.index),
            current_stream=lambda device: self.compute[device.index],
            Event=object,
        )
        on_cpu = SimpleNamespace(
            cuda=cuda,
            zeros=torch.zeros,
            int64=torch.int64,
            empty=lambda shape, dtype, device: torch.full(shape, POISON, dtype=dtype),
        )
        patch.setattr(pipeline_peer_links, "torch", on_cpu)

    def run(self, hosts, draw, blocked):
        """All hosts to their end. `blocked`: a host goes on only while its rank's queues are empty.

        That is what a host does that loads a kernel, where CUDA waits for all running ones.
        """
        hosts = dict(enumerate(hosts))
        while True:
            queues = list({id(stream.queue): stream.queue for stream in self.streams}.values())
            turns = [queue.advance for queue in queues]
            turns += [lambda rank=rank: self._advance(hosts, rank, blocked) for rank in hosts]
            draw.shuffle(turns)
            if not any(turn() for turn in turns):
                if not hosts and all(queue.empty for queue in queues):
                    return
                raise StuckError

    def _advance(self, hosts, rank, blocked):
        if blocked and not self._idle(rank):
            return False
        try:
            next(hosts[rank])
        except StopIteration:
            del hosts[rank]
            return True
        return True

    def _idle(self, rank):
        mine = [self.compute[rank], *(s for s in self.streams if getattr(s, "rank", None) == rank)]
        return all(stream.queue.empty for stream in mine)


def edges_of(schedule):
    """Of different size, and with something that has no gradient."""
    return {
        (s, d): (((s + 3,), torch.float32), ((2, d + 1), torch.int32))
        for s in range(schedule.num_stages - 1)
        for d in range(schedule.num_directions)
    }


def content(key, signature):
    """The tensors of an item: nothing else has these numbers."""
    tensor, stage, chunk, direction = key
    number = 1000 * (stage + 1) + 10 * chunk + 4 * direction + 2 * (tensor == "gradient") + 1
    return [
        None
        if tensor == "gradient" and not dtype.is_floating_point
        else torch.full(shape, number + i, dtype=dtype)
        for i, (shape, dtype) in enumerate(signature)
    ]


def host(machine, schedule, rank, links, errors, modes):
    """One rank's steps, an action at a time: receive, check, make, send, forget."""
    edges, queue = edges_of(schedule), machine.compute[rank].queue
    agreement = SimpleNamespace(rank=rank, timeout=1.0)
    send_item, sent = links.send, []  # what the allocator would hand out again once nobody keeps it

    def keep(tensors, target):
        moving = send_item(tensors, target)
        sent.append((weakref.ref(moving), tensors))
        return moving

    links.send = keep
    for forward_only in modes:
        transfers = Transfers(
            schedule, links, agreement, edges, 0, Failure(), forward_only=forward_only
        )
        for position, action in enumerate(schedule.actions[rank]):
            parts = [p for p in action.parts if p.op == "F" or not forward_only]
            transfers.post(position)
            for part in parts:
                if part.op != "W":
                    receive(schedule, rank, transfers, part, queue, edges, errors)
            for part in reversed(parts):
                if part.op != "W":
                    send(schedule, rank, transfers, part, queue, edges)
            yield
            reuse(sent, queue)
        transfers.finish()
        reuse(sent, queue)
        assert not sent


def receive(schedule, rank, transfers, part, queue, edges, errors):
    tensor, source = ("activation", part.stage - 1), ("gradient", part.stage + 1)
    tensor, stage = tensor if part.op == "F" else source
    key = (tensor, stage, part.chunk, part.direction)
    if not 0 <= stage < schedule.num_stages or schedule.rank_of(stage, part.direction) == rank:
        return
    found = transfers.receive(*key)
    expected = content(key, edges[stage - (tensor == "gradient"), part.direction])

    def compare():
        for mine, right in zip(found, expected, strict=True):
            if mine is not right and (mine is None or right is None or not mine.equal(right)):
                errors.append((rank, key, mine, right))

    queue.operations.append(compare)


def send(schedule, rank, transfers, part, queue, edges):
    tensor, target = (
        ("activation", part.stage + 1) if part.op == "F" else ("gradient", part.stage - 1)
    )
    key = (tensor, part.stage, part.chunk, part.direction)
    if not 0 <= target < schedule.num_stages or schedule.rank_of(target, part.direction) == rank:
        return
    made = content(key, edges[part.stage - (tensor == "gradient"), part.direction])
    tensors = [None if y is None else torch.full_like(y, POISON) for y in made]
    queue.operations.append(lambda: fill(tensors, made))
    transfers.send(*key, tensors)


def reuse(sent, queue):
    """What nobody keeps is overwritten by what the compute stream does next."""
    for moving, tensors in list(sent):
        if moving() is None or not moving().tensors:
            poison = [torch.full_like(tensor, POISON) for tensor in tensors]
            queue.operations.append(lambda tensors=tensors, poison=poison: fill(tensors, poison))
            sent[:] = [entry for entry in sent if entry[0] is not moving]


def fill(tensors, values):
    for tensor, value in zip(tensors, values, strict=True):
        if tensor is not None:
            tensor.copy_(value)


def run_pipeline(kind, ranks, chunks, seed, *, serial, blocked, modes=(False, True, False)):
    """All ranks' steps; returns what arrived wrong. Raises StuckError."""
    schedule, errors = build_schedule(kind, ranks, chunks), []
    with pytest.MonkeyPatch.context() as patch:
        machine = Machine(ranks, serial)
        machine.install(patch)
        needs = [incoming_bytes(schedule, rank, edges_of(schedule)) for rank in range(ranks)]
        layout = LinkLayout.of(needs)
        hosts = []
        for rank in range(ranks):
            before = len(machine.streams)
            links = PeerLinks(None, rank, layout, torch.device("cuda", rank), 1.0)
            for stream in machine.streams[before:]:
                stream.rank = rank
            hosts.append(host(machine, schedule, rank, links, errors, modes))
        machine.run(hosts, random.Random(seed), blocked)
    return errors


SIZES = st.sampled_from([(2, 4), (2, 6), (4, 8), (4, 12), (6, 12), (8, 16)])


@settings(max_examples=40)
@given(
    st.sampled_from(KINDS), SIZES, st.integers(0, 2**20), st.sampled_from(["", "serial", "blocked"])
)
def test_items_arrive_in_any_order_of_events(kind, sizes, seed, mode):
    """With streams of their own, all in one queue, and with hosts that wait for their queues."""
    options = {"serial": mode == "serial", "blocked": mode == "blocked"}
    assert run_pipeline(kind, *sizes, seed, **options) == []


@pytest.mark.parametrize("kind", KINDS)
def test_two_slots_are_enough_to_finish(kind, monkeypatch):
    monkeypatch.setattr(pipeline_peer_links, "SLOTS", 2)
    monkeypatch.setattr(PeerLinks, "kept", 0)  # computing waits for every send
    for ranks, chunks in ((2, 4), (4, 8), (8, 16)):
        assert run_pipeline(kind, ranks, chunks, 0, serial=True, blocked=True) == []


def test_one_slot_is_not(monkeypatch):
    """Were computing to wait for its sends; as it is, one slot would do."""
    monkeypatch.setattr(pipeline_peer_links, "SLOTS", 1)
    assert run_pipeline("dualpipev", 4, 8, 0, serial=False, blocked=False) == []
    with pytest.raises(StuckError):
        run_pipeline("dualpipev", 4, 8, 0, serial=True, blocked=False)


@pytest.mark.parametrize("p2p", [0, 0.5, 1])
@pytest.mark.parametrize("kind", KINDS)
def test_slots_hold_what_lies_untaken(kind, p2p):
    """Equal stages, transfers that take none, half or all of a forward's time: at most two."""
    for ranks, chunks in ((2, 4), (4, 8), (8, 32), (32, 64)):
        schedule = build_schedule(kind, ranks, chunks)
        spans = simulate(schedule, Times(p2p=p2p)).spans
        events: dict[tuple, list] = {}
        for t in schedule.transfers():
            sent, taken = spans[t.source][t.sent_after].end, spans[t.target][t.needed_by].start
            events.setdefault((t.source, t.target), []).append((sent, taken))
        for times in events.values():
            for moment, _ in times:
                lying = sum(sent <= moment < taken for sent, taken in times)
                assert lying + 2 <= SLOTS


def test_layout_example():
    """Rank 1 gets from both sides; its two links' slots follow each other."""
    layout = LinkLayout.of([{1: 1000}, {0: 300, 2: 256}, {1: 16}])
    assert layout.slot_bytes == {(1, 0): 1024, (0, 1): 512, (2, 1): 256, (1, 2): 256}
    assert [layout.slot(0, 1, n) for n in range(1, 6)] == [256, 768, 1280, 1792, 256]
    assert [layout.slot(2, 1, n) for n in (1, 4, 5)] == [2304, 3072, 2304]
    assert layout.nbytes == 256 + 4 * 1024  # rank 0's
    smaller = LinkLayout.of([{1: 900}, {0: 512, 2: 0}, {1: 16}])
    assert layout.joined(layout) == layout.joined(smaller) == smaller.joined(layout) == layout
    larger = layout.joined(LinkLayout.of([{1: 0}, {0: 513, 2: 0}, {1: 0}]))
    assert larger.slot_bytes == layout.slot_bytes | {(0, 1): 768}


def test_flags_do_not_touch():
    layout = LinkLayout.of([{r - 1: 8} if r else {} for r in range(8)])
    words = [layout.arrived(r) for r in range(8)] + [layout.taken(r) for r in range(8)]
    words.append(layout.abort)
    assert sorted(words) == list(range(0, 8 * 17, 8))
    assert max(words) + 8 <= min(layout.slot(r, r + 1, n) for r in range(7) for n in range(1, 9))


@pytest.mark.parametrize("sends", [True, False])
def test_what_the_device_reports_is_raised(sends, monkeypatch):
    machine = Machine(2, serial=False)
    machine.install(monkeypatch)
    layout = LinkLayout.of([{1: 16}, {0: 16}])
    links = PeerLinks(None, 0, layout, torch.device("cuda", 0), 3.0)
    links.check()
    links._fault.copy_(torch.tensor([1, 1, int(sends), 9, 7]))
    for call in (links.check, lambda: links.send([], 1), lambda: links.receive([], 1)):
        with pytest.raises(PeerTimeoutError, match="rank 0 waited 3 s for rank 1") as raised:
            call()
        error = raised.value
        assert (error.peer, error.expected, error.seen) == (1, 9, 7)
        way = "0 to 1" if sends else "1 to 0"
        assert way in error.channel and error.phase.startswith("send" if sends else "receive")
