"""Local search for placements: swaps of slots and copies given elsewhere, all layers at once.

Letters as in eplb_packing: E experts, R slots, G GPUs, S slots a GPU, X problems side by side (one
a layer and node), and A of these problems that take a step. A GPU's load is the sum over its slots
of load / copies, in float64.
"""

from dataclasses import dataclass

import torch

from .measures import copies_on_gpus

__all__ = ["PlacementSearch"]

# A step must lower the heaviest GPU by this share of the mean load; smaller ones are not worth
# their time, and rounding could make them go in circles.
SMALLEST_GAIN = 1e-4
# How many slots are judged in full for a new copy of another expert. Mean balance over 32 kinds of
# loads and sizes: 0.9224 with 4, 0.9225 with 16, 0.9227 with 64, which takes a tenth longer.
SHORTLIST = 16


@dataclass
class Step:
    """One change in each of A problems: slot_a takes expert_a, slot_b expert_b. All are [A]."""

    problem: torch.Tensor
    slot_a: torch.Tensor
    slot_b: torch.Tensor
    expert_a: torch.Tensor
    expert_b: torch.Tensor
    score: torch.Tensor  # lowering of the heaviest GPU per copy sent; 0: no step was found
    sent: torch.Tensor  # copies to send because of it, less those that now stay at home

    def select(self, index: torch.Tensor) -> "Step":
        return Step(**{name: value[index] for name, value in vars(self).items()})

    def replace(self, asked: torch.Tensor, other: "Step") -> None:
        """Take the other's steps, of the problems asked (a mask), where they score more."""
        better = other.score > self.score[asked]
        for name, value in vars(self).items():
            value[asked] = torch.where(better, getattr(other, name), value[asked])


class PlacementSearch:
    """Steps that lower the heaviest GPU of every layer.

    A step swaps two slots of different GPUs, or gives an expert of the heaviest GPU one more copy
    in the slot of an expert that has several. No step puts two copies of an expert on one GPU, and
    those that the start holds are parted first, unless a GPU has more slots than there are experts
    and must hold some twice.

    Args:
        load_XE: [X, E].
        expert_XR: [X, R] the start, R/num_gpus slots a GPU; experts without a slot are ignored.
        problems_per_layer: so many problems in a row share one maximum (nodes of a layer).
        home_XR: today's placement, [X, R]: what a GPU does not hold there has to be sent to it.
        budget: how many copies may be sent in all; needs home_XR.
    """

    def __init__(
        self,
        load_XE: torch.Tensor,
        expert_XR: torch.Tensor,
        num_gpus: int,
        *,
        problems_per_layer: int = 1,
        home_XR: torch.Tensor | None = None,
        budget: int | None = None,
    ) -> None:
        self.load = load_XE.double()
        self.expert = expert_XR.clone()
        self.num_gpus = num_gpus
        num_slots, num_experts = expert_XR.shape[1], load_XE.shape[1]
        self.gpu_of_slot = torch.arange(num_slots) // (num_slots // num_gpus)
        self.problems_per_layer = problems_per_layer
        self.budget = budget
        self.away = None
        if home_XR is not None:
            self.away = (copies_on_gpus(home_XR, num_gpus, num_experts) == 0).int()
        self.refresh()

    def refresh(self) -> None:
        self.on_gpu = copies_on_gpus(self.expert, self.num_gpus, self.load.shape[1])
        self.count = self.on_gpu.sum(1)
        self.slot_load = (self.load / self.count).gather(-1, self.expert)
        self.gpu_load = self.slot_load.unflatten(-1, (self.num_gpus, -1)).sum(-1)

    def run(self) -> torch.Tensor:
        """Search until nothing helps or the budget is spent; returns the placement, [X, R]."""
        num_experts = (self.count > 0).sum(-1)
        if bool((num_experts >= self.expert.shape[1] // self.num_gpus).all()):
            self.separate_copies()
        smallest_gain = SMALLEST_GAIN * self.gpu_load.mean(-1)
        stuck = torch.zeros(len(self.expert), dtype=torch.bool)
        while True:
            peak = self.gpu_load.amax(-1).view(-1, self.problems_per_layer)
            first = torch.arange(len(peak)) * self.problems_per_layer
            problem = first + peak.argmax(-1)
            problem = problem[~stuck[problem]]
            if len(problem) == 0:
                return self.expert
            step = self.best_step(problem, smallest_gain[problem])
            found = step.score > 0
            stuck[problem[~found]] = True
            self.apply(step.select(found))

    def separate_copies(self) -> None:
        """Swap until no GPU holds two copies of one expert, as far as budget and slots allow.

        An expert with at most G copies, two of them on GPU g, is missing on some GPU h. Either h
        holds something that g does not, or all of h is among the fewer than S experts of g and h
        holds one of them twice: a swap always lowers the number of copies that stand together.
        """
        while True:
            by_gpu = self.expert.unflatten(-1, (self.num_gpus, -1))
            second = (by_gpu[..., None] == by_gpu[..., None, :]).tril(-1).any(-1).flatten(-2)
            problem = second.any(-1).nonzero()[:, 0]
            slot = second[problem].int().argmax(-1, keepdim=True)
            step = self.best_swap(problem, slot, parting=True)
            step = step.select(step.score > 0)
            if len(step.problem) == 0:
                return
            self.apply(step)

    def best_step(self, problem: torch.Tensor, smallest_gain: torch.Tensor) -> Step:
        """The best step of each of these problems; smallest_gain is in loads."""
        heaviest = self.gpu_load[problem].argmax(-1, keepdim=True)
        slots_per_gpu = len(self.gpu_of_slot) // self.num_gpus
        slots = heaviest * slots_per_gpu + torch.arange(slots_per_gpu)
        step = self.best_swap(problem, slots, smallest_gain)
        # A new copy takes several times as long to judge: ask where swaps are at their end, or
        # where every copy sent counts (a new copy sends one, a swap two).
        ask = (step.score <= 0) | (self.away is not None)
        if ask.any():
            step.replace(ask, self.best_new_copy(problem[ask], slots[ask], smallest_gain[ask]))
        return step

    def best_swap(
        self,
        problem: torch.Tensor,
        slots: torch.Tensor,
        smallest_gain: torch.Tensor | None = None,
        parting: bool = False,
    ) -> Step:
        """Swap one of `slots` [A, n] (of one GPU a problem) with a slot of another GPU.

        With parting the slots hold copies that must leave their GPU, whatever the loads.
        """
        row = torch.arange(len(problem))
        gpu = self.gpu_of_slot[slots[:, 0]]
        expert, on_gpu = self.expert[problem], self.on_gpu[problem]
        mine = expert.gather(-1, slots)
        load, gpu_load = self.slot_load[problem], self.gpu_load[problem]

        shift = load.gather(-1, slots)[..., None] - load[:, None]
        before = gpu_load[row, gpu][:, None, None]
        after = torch.maximum(before - shift, gpu_load[:, None, self.gpu_of_slot] + shift)

        meets = on_gpu[row, gpu].gather(-1, expert) > 0
        if parting:  # may bring this GPU a second copy from a GPU that held two of it
            meets &= self.own(on_gpu, expert) == 1
        allowed = (self.per_slot(on_gpu, mine) == 0) & ~meets[:, None]
        sent = torch.zeros_like(allowed, dtype=torch.int32)
        if self.away is not None:
            away_here, here = self.away[problem][row, gpu], on_gpu[row, gpu]
            arrives = away_here.gather(-1, expert) * (here.gather(-1, expert) == 0)
            leaves = away_here.gather(-1, mine) * (here.gather(-1, mine) == 1)
            sent += self.per_slot(self.away[problem], mine) - leaves[..., None]
            sent += (arrives - self.spared(problem))[:, None]

        if parting:
            score = 1 / (1 + after / gpu_load.mean(-1)[:, None, None].clamp(min=1e-300))
        else:
            assert smallest_gain is not None
            score = self.judge(before - after, sent, smallest_gain)
        index, score, sent = self.best(score, sent, allowed)
        slot_a = slots[row, index // expert.shape[1]]
        slot_b = index % expert.shape[1]
        return Step(problem, slot_a, slot_b, expert[row, slot_b], expert[row, slot_a], score, sent)

    def best_new_copy(
        self, problem: torch.Tensor, slots: torch.Tensor, smallest_gain: torch.Tensor
    ) -> Step:
        """Give an expert of `slots` [A, S], the heaviest GPU's, a copy in the slot of a copy."""
        row = torch.arange(len(problem))
        expert, on_gpu = self.expert[problem], self.on_gpu[problem]
        mine = expert.gather(-1, slots)
        gain, tried = self.gains_of_new_copies(problem, slots)
        column = tried[:, None].expand(-1, mine.shape[1], -1)

        has_others = self.count[problem].gather(-1, expert.gather(-1, tried)) >= 2
        allowed = (self.per_slot(on_gpu, mine).gather(-1, column) == 0) & has_others[:, None]
        sent = torch.zeros_like(allowed, dtype=torch.int32)
        if self.away is not None:
            sent += self.per_slot(self.away[problem], mine).gather(-1, column)
            sent -= self.spared(problem).gather(-1, tried)[:, None]
        index, score, sent = self.best(self.judge(gain, sent, smallest_gain), sent, allowed)
        slot = tried[row, index % tried.shape[1]]
        new = mine[row, index // tried.shape[1]]
        return Step(problem, slot, slot, new, new, score, sent)

    def gains_of_new_copies(
        self, problem: torch.Tensor, slots: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """How much lighter the heaviest GPU gets with a copy of one of its experts elsewhere.

        All GPUs that hold a copy of either expert change: less of the one, more of the other.

        Returns:
            gain [A, S, t] for the experts in `slots` [A, S] and the slots tried [A, t].
        """
        row = torch.arange(len(problem))
        gpu = self.gpu_of_slot[slots[:, 0]]
        expert, on_gpu = self.expert[problem], self.on_gpu[problem]
        count, load = self.count[problem], self.load[problem]
        gpu_load, slot_load = self.gpu_load[problem], self.slot_load[problem]
        before = gpu_load[row, gpu][:, None]

        mine = expert.gather(-1, slots)
        new_load = load.gather(-1, mine) / (count.gather(-1, mine) + 1)
        copies = count.gather(-1, expert)
        fewer_load = load.gather(-1, expert) / (copies - 1).clamp(min=1)
        # [A, R, G]: loads once the copy in slot R is given up, nothing in its place yet.
        without = gpu_load[:, None] + (fewer_load - slot_load)[..., None] * self.held(
            on_gpu, expert
        )
        there = self.gpu_of_slot[:, None] == torch.arange(self.num_gpus)
        without -= there * fewer_load[..., None]

        # Judge in full the slots whose loss burdens the other GPUs least.
        burden = without + there * new_load.amin(-1)[:, None, None]
        burden[row, :, gpu] -= before
        burden = burden.amax(-1).masked_fill(copies < 2, torch.inf)
        tried = burden.topk(min(SHORTLIST, burden.shape[1]), largest=False).indices

        relief = (slot_load.gather(-1, slots) - new_load)[..., None] * self.held(on_gpu, mine)
        after = without[row[:, None], tried][:, None] - relief[:, :, None]
        after += there[tried][:, None] * new_load[..., None, None]
        return before[..., None] - after.amax(-1), tried

    def apply(self, step: Step) -> None:
        """Take the steps, as many of the best as the budget allows: at least one."""
        if self.budget is not None and len(step.problem):
            # Layers far from balance first: a round takes steps at least half as good as its best,
            # or the budget would be spread over layers that hardly need it.
            step = step.select(step.score.argsort(descending=True))
            step = step.select(step.score >= step.score[0] / 2)
            step = step.select(step.sent.cumsum(0) <= self.budget)
            self.budget -= int(step.sent.sum())
        self.expert[step.problem, step.slot_a] = step.expert_a
        self.expert[step.problem, step.slot_b] = step.expert_b
        self.refresh()

    # ---- Tables of candidates: [A, n, R] for n experts of one GPU and all slots ----

    def held(self, table_AGE: torch.Tensor, expert_An: torch.Tensor) -> torch.Tensor:
        """[A, n, G]: the table's entry for each expert on each GPU."""
        return table_AGE.gather(-1, expert_An[:, None].expand(-1, self.num_gpus, -1)).mT

    def per_slot(self, table_AGE: torch.Tensor, expert_An: torch.Tensor) -> torch.Tensor:
        """[A, n, R]: the table's entry for each expert on the GPU of each slot."""
        return self.held(table_AGE, expert_An)[..., self.gpu_of_slot]

    def own(self, table_AGE: torch.Tensor, expert_AR: torch.Tensor) -> torch.Tensor:
        """[A, R]: the table's entry for the expert of each slot on that slot's GPU."""
        return table_AGE.flatten(1).gather(-1, self.gpu_of_slot * table_AGE.shape[-1] + expert_AR)

    def spared(self, problem: torch.Tensor) -> torch.Tensor:
        """[A, R]: 1 for slots that were to be sent a copy, and need none without it."""
        assert self.away is not None
        expert = self.expert[problem]
        alone = self.own(self.on_gpu[problem], expert) == 1
        return self.own(self.away[problem], expert) * alone

    def judge(
        self, gain: torch.Tensor, sent: torch.Tensor, smallest_gain: torch.Tensor
    ) -> torch.Tensor:
        """Score of every candidate: gain per copy sent, 0 where it is too small."""
        enough = gain > smallest_gain[:, None, None]
        return torch.where(enough, gain / sent.clamp(min=1), 0.0)

    def best(
        self, score: torch.Tensor, sent: torch.Tensor, allowed: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Index into the last two dimensions, score (0: none is possible) and copies sent."""
        if self.budget is not None:
            allowed = allowed & (sent <= self.budget)
        score, index = torch.where(allowed, score, 0.0).flatten(1).max(-1)
        return index, score, sent.flatten(1).gather(-1, index[:, None])[:, 0]
