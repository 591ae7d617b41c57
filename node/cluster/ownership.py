"""The life of one instance in the hands of its owner: plan, start, wire, serve, and plan again. Pure.

The owner's pump feeds it what happens and the time, and carries out the actions it returns. Every new plan has a higher
epoch; whatever an earlier epoch still says is ignored.

After a loss everything is planned anew. A planned move (a better plan, a node that leaves) is prepared while the
present epoch serves: its stages are started and wired next to the old ones where memory has room for both, else their
layers are fetched first and the old stages are ended only then.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from msgspec.structs import replace

from swarmd.discovery.records import Address, InstanceRecord, InstanceState, ModelSummary
from swarmd.node.cluster.actions import Action, FetchStages, StartStages, StopStages, TakeStages, WireStages
from swarmd.node.cluster.bring_up import BringUp, Move
from swarmd.node.cluster.planning import Improvement, Surroundings, Undecided, plan_anew, plan_move
from swarmd.partition.costs import ModelCosts
from swarmd.partition.plan import DoesNotFit, Plan, Promise

FIRST_RETRY_SECONDS = 0.25
LAST_RETRY_SECONDS = 15.0
# Who has served for so long begins with short pauses again after a loss.
STEADY_SECONDS = 2.0
# A better plan must have been the better one for so long, and the present one must have served for so long.
GAIN_SECONDS = 2.0
# If streams could have to wait for it, nobody must have been seen for so long, or it must have lasted much longer.
IDLE_SECONDS = 4.0
BUSY_GAIN_SECONDS = 30.0
FIRST_MOVE_RETRY_SECONDS = 5.0
LAST_MOVE_RETRY_SECONDS = 300.0


class OwnedInstance:
    """One instance, owned by this node. `record` is what its owner publishes, `last_epoch` the highest ever planned."""

    def __init__(
        self,
        instance_id: str,
        model: ModelSummary,
        costs: ModelCosts,
        promises: Sequence[Promise],
        *,
        epoch: int = 0,
        split: bool = False,
    ) -> None:
        """`epoch` is the highest one that anybody has seen of this instance; the first plan gets the next."""
        self.record = InstanceRecord(instance_id, model, InstanceState.PLANNING, epoch, split=split)
        self._costs = costs
        self._promises = tuple(promises)
        self._build: BringUp | None = None
        self._move: Move | None = None
        self._improvement = Improvement()
        self._remains: tuple[str, ...] = ()
        self.last_epoch = epoch
        self._retry_seconds = FIRST_RETRY_SECONDS
        self._retry_at = -math.inf
        self._served: Plan | None = None
        self._tried: tuple[frozenset[tuple[str, str]], frozenset[str]] | None = None
        self._ready_at = math.inf
        self._gain_since: float | None = None
        self._busy_at = self._move_at = -math.inf
        self._move_retry_seconds = FIRST_MOVE_RETRY_SECONDS

    @property
    def epoch(self) -> int:
        """The epoch of the present plan."""
        return self.record.epoch

    @property
    def move(self) -> BringUp | None:
        """The stages that are to take over from those of the record, if there are any."""
        return self._move.build if self._move is not None else None

    def adopt(self, running: InstanceRecord, now: float) -> list[Action]:
        """Go on with what another owner has left behind: its stages serve as before, under this owner's term.

        What that owner wished, a split or a short context, goes on to hold.
        """
        self.record = replace(running, term=running.term + 1, reason="")
        self._promises = tuple(p for p in self._promises if p.context <= running.model.context) or self._promises
        self.last_epoch = running.epoch
        self._ready_at = now
        return [TakeStages(self.epoch, self.record.stages)]

    def consider(self, around: Surroundings, now: float, *, idle: bool = False) -> list[Action]:
        """Look at who is there and act if the plan has to change; called on every change and every tick.

        `idle` says that nobody would be disturbed by a better plan.
        """
        there = around.devices
        lost = sum(1 for stage in self.record.stages if (stage.node, stage.device) not in there)
        if lost:
            return self._replan(around, now, f"{lost} of {len(self.record.stages)} stages lost their node")
        actions: list[Action] = []
        if self._move is not None and any((s.node, s.device) not in there for s in self._move.build.stages):
            actions = self._give_up_move(now)
        if self.record.state is InstanceState.READY:
            return actions + self._consider_move(around, now, idle)
        if self.record.state is InstanceState.LOADING or (now < self._retry_at and self._tried == around.news):
            return actions
        return actions + self._replan(around, now)

    def on_progress(self, epoch: int, index: int, done: int, total: int) -> None:
        """A stage has fetched and loaded so many bytes."""
        build = self.building(epoch)
        if build is not None:
            build.on_progress(index, done, total)
            if build is self._build:
                done_bytes, total_bytes = build.done
                self.record = replace(self.record, done_bytes=done_bytes, total_bytes=total_bytes)

    def on_fetched(self, epoch: int, index: int) -> list[Action]:
        """A node has what its stage will need; when all have, the stages take the place of those that serve."""
        move = self._move
        if move is None or move.beside or move.build.epoch != epoch:
            return []
        if not move.build.on_started(index, ()) or not move.build.all_started:
            return []
        self._move = None
        return self._begin(move.build, move.reason)

    def on_started(self, epoch: int, index: int, addresses: tuple[Address, ...]) -> list[Action]:
        """A stage is loaded and accepts links; when all are, they are wired."""
        build = self.building(epoch)
        fetching = self._move is not None and build is self._move.build and not self._move.beside
        if build is None or fetching or not build.on_started(index, addresses):
            return []
        if build is self._build:
            self.record = replace(self.record, stages=build.stages)
        return [WireStages(epoch, build.stages)] if build.all_started else []

    def on_wired(self, epoch: int, index: int, now: float) -> list[Action]:
        """A stage is connected; when all are, the instance is ready, or goes over to them."""
        build = self.building(epoch)
        if build is None or not build.on_wired(index) or not build.all_wired:
            return []
        if self._move is not None and build is self._move.build:
            return self._go_over(now)
        self._served, self._build, self._ready_at = build.plan, None, now
        self.record = replace(self.record, state=InstanceState.READY, reason="")
        return []

    def on_stage_lost(self, epoch: int, reason: str, now: float, *, refused: bool = False) -> list[Action]:
        """A stage failed to start, or ended, or lost a neighbour: the epoch is over.

        The other stages are left alone: those that the next plan wants just so are kept. Unless a node `refused` for
        want of room: who has that may wait for just the room that these stages take, of which no record tells.
        """
        if self._move is not None and epoch == self._move.build.epoch:
            return self._give_up_move(now)
        if epoch != self.epoch or not self.record.stages:
            return []
        if self._move is not None and self._move.beside:
            stop, move, self._move = self._stop_epoch(), self._move, None
            self._show(move.build, reason)
            return [stop]
        if now - self._ready_at >= STEADY_SECONDS:
            self._retry_seconds = FIRST_RETRY_SECONDS
        self._retry_at = now + self._retry_seconds
        self._retry_seconds = min(2 * self._retry_seconds, LAST_RETRY_SECONDS)
        self._wait(InstanceState.PLANNING, reason)
        return self.stop() if refused else []

    def stop(self) -> list[Action]:
        """The owner lets the instance go."""
        nodes = self._holders()
        self._remains = ()
        return [StopStages(self.last_epoch, nodes)] if nodes else []

    def building(self, epoch: int) -> BringUp | None:
        """The stages of an epoch that are on their way up, if they are."""
        builds = (self._build, self._move.build if self._move is not None else None)
        return next((build for build in builds if build is not None and build.epoch == epoch), None)

    def _stop_epoch(self) -> StopStages:
        """End the stages of the record, not those that are to take over."""
        return StopStages(self.epoch, tuple(dict.fromkeys(stage.node for stage in self.record.stages)))

    def _wait(self, state: InstanceState, reason: str, missing: int = 0) -> None:
        """Nothing serves, for this reason."""
        self._remains = self._holders()
        self._build, self._move, self._gain_since, self._ready_at = None, None, None, math.inf
        waiting = replace(
            self.record,
            state=state,
            reason=reason[:512],
            stages=(),
            explanation=(),
            done_bytes=0,
            total_bytes=0,
            missing_bytes=missing,
        )
        self.record = self.record if waiting == self.record else waiting

    def _replan(self, around: Surroundings, now: float, reason: str = "") -> list[Action]:
        """Start over with who is there, or wait until they suffice."""
        self._tried = around.news
        try:
            made = plan_anew(self._costs, self._promises, around, split=self.record.split, served=self._served)
        except Undecided as error:
            self._wait(InstanceState.PLANNING, str(error))
            return []
        except DoesNotFit as error:
            actions = self.stop()
            self._wait(InstanceState.WAITING, str(error), error.missing)
            self._remains = ()
            return actions
        return self._begin(self._next_build(made), reason)

    def _holders(self) -> tuple[str, ...]:
        """The nodes with a stage of the record, of a move, or of an epoch that is over."""
        coming = self._move.build.nodes if self._move is not None else ()
        return tuple(dict.fromkeys([*self._remains, *(stage.node for stage in self.record.stages), *coming]))

    def _next_build(self, made: Plan) -> BringUp:
        self.last_epoch += 1
        return BringUp(self.last_epoch, made)

    def _begin(self, build: BringUp, reason: str) -> list[Action]:
        """Put a plan in the place of the present one. Nodes that stay end their earlier stages themselves."""
        left = tuple(node for node in self._holders() if node not in build.nodes)
        self._move, self._remains = None, ()
        build.restart()
        self._show(build, reason)
        stop = [StopStages(build.epoch - 1, left)] if left else []
        return [*stop, StartStages(build.epoch, build.plan)]

    def _show(self, build: BringUp, reason: str) -> None:
        """The record tells of a plan whose stages are on their way up."""
        self._build, self._gain_since, self._ready_at = build, None, math.inf
        self.record = replace(
            self._with_plan(build), state=InstanceState.LOADING, reason=reason[:512], done_bytes=0, total_bytes=0
        )

    def _with_plan(self, build: BringUp) -> InstanceRecord:
        return replace(
            self.record,
            model=replace(self.record.model, context=build.plan.promise.context),
            epoch=build.epoch,
            stages=build.stages,
            explanation=tuple(line[:512] for line in build.plan.explanation[:64]),
            missing_bytes=0,
        )

    def _consider_move(self, around: Surroundings, now: float, idle: bool) -> list[Action]:
        """While serving: make room for nodes that leave, and use better plans that last."""
        self._busy_at = self._busy_at if idle else now
        if self._move is not None or now < self._move_at:
            return []
        if any(stage.node in around.leaving for stage in self.record.stages):
            return self._start_move(around, "a node leaves", disturb=True)
        better = self._improvement.over(self.record, self._costs, self._promises, around)
        if better is None:
            self._gain_since = None
            return []
        self._gain_since = now if self._gain_since is None else self._gain_since
        lasted = now - max(self._gain_since, self._ready_at)
        if lasted < GAIN_SECONDS:
            return []
        # Streams that have lost their pipeline come back in a moment: who serves is not idle at once.
        quiet = idle and now - max(self._busy_at, self._ready_at) >= IDLE_SECONDS
        return self._start_move(around, better, disturb=quiet or lasted >= BUSY_GAIN_SECONDS)

    def _start_move(self, around: Surroundings, reason: str, *, disturb: bool) -> list[Action]:
        """Bring the new plan up beside the old one; where memory is short and it may `disturb`, in its place."""
        held = {(stage.node, stage.device): stage.bytes for stage in self.record.stages}
        try:
            made, beside = plan_move(self._costs, self._promises, around, held, split=self.record.split)
        except DoesNotFit as error:
            self.record = replace(self.record, reason=f"{reason}: {error}"[:512], missing_bytes=error.missing)
            return []
        if not beside and not disturb:
            return []
        build = self._next_build(made)
        self._move = Move(build, beside, reason)
        return [StartStages(build.epoch, made, beside=True) if beside else FetchStages(build.epoch, made)]

    def _go_over(self, now: float) -> list[Action]:
        """The new stages serve; the old ones end."""
        move, old = self._move, self._stop_epoch()
        assert move is not None
        self._move, self._build, self._served, self._gain_since = None, None, move.build.plan, None
        self._ready_at = now
        self._move_retry_seconds = FIRST_MOVE_RETRY_SECONDS
        self.record = replace(self._with_plan(move.build), state=InstanceState.READY, reason="")
        return [old]

    def _give_up_move(self, now: float) -> list[Action]:
        """What serves goes on; the next try waits."""
        assert self._move is not None
        build, beside = self._move.build, self._move.beside
        self._move, self._gain_since = None, None
        self._move_at = now + self._move_retry_seconds
        self._move_retry_seconds = min(2 * self._move_retry_seconds, LAST_MOVE_RETRY_SECONDS)
        return [StopStages(build.epoch, build.nodes, since=build.epoch)] if beside else []
