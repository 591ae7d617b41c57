"""Who is in the swarm: one record per node, last writer wins, and a failure detector. Pure; time is passed in seconds.

Each node speaks only for itself, so there is nothing to elect. A node whose links close, or that says nothing for
`SUSPECT_SECONDS`, is suspected; it is gone when that lasts `GONE_SECONDS` more, or at once when it said that it leaves
or when its machine says that no such program listens any more.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from swarmd.discovery.records import MAX_CUT_OFF, NodeRecord

# A false alarm costs a pause, not a token; an answer that stands still must go on within a few seconds.
SUSPECT_SECONDS = 1.5
GONE_SECONDS = 1.0
FORGET_SECONDS = 60.0
MAX_GONE = 64


class MemberState(StrEnum):
    """What the failure detector thinks of a node."""

    ALIVE = "alive"
    SUSPECT = "suspect"
    GONE = "gone"


@dataclass
class Member:
    """One other node as this one sees it; `since` is when its state began, `heard` when it last spoke.

    `unlinked` says that its record is from before the last link went down.
    """

    record: NodeRecord
    state: MemberState
    heard: float
    since: float
    unlinked: bool = False


@dataclass(frozen=True)
class MemberChange:
    """A node's state changed, or its record did. `heard_again`: it was silent or without a link, and is back."""

    node_id: str
    state: MemberState
    joined: bool = False
    heard_again: bool = False


class Membership:
    """The other nodes of the swarm. Every method returns the changes it caused."""

    def __init__(self) -> None:
        self._members: dict[str, Member] = {}
        self._links: dict[str, int] = {}
        # Those of them that are counted on, and the others; made anew after a change, since they are asked for at every
        # event of a swarm, of hundreds perhaps.
        self._there: dict[str, NodeRecord] | None = None
        self._gone: dict[str, Member] = {}
        self._suspects: frozenset[str] | None = None
        self._cut_off: tuple[str, ...] | None = None

    @property
    def members(self) -> dict[str, Member]:
        """All nodes known, gone ones included, by id."""
        return dict(self._members)

    def alive(self) -> list[NodeRecord]:
        """The records of the nodes that are counted on, suspected ones included: they may yet answer."""
        if self._there is None:
            self._there = {m.record.id: m.record for m in self._members.values() if m.state is not MemberState.GONE}
        return list(self._there.values())

    def suspects(self) -> frozenset[str]:
        """The nodes that say nothing at present and may yet be heard."""
        if self._suspects is None:
            self._suspects = frozenset(m.record.id for m in self._members.values() if m.state is MemberState.SUSPECT)
        return self._suspects

    def gone(self) -> list[NodeRecord]:
        """The last records of the nodes that are gone and not forgotten yet."""
        return [member.record for member in self._gone.values()]

    def cut_off(self) -> tuple[str, ...]:
        """The ids of those that are gone or suspected and did not say that they leave: others may still hear them."""
        if self._cut_off is None:
            silent = [*self._gone.values(), *(self._members[node_id] for node_id in self.suspects())]
            lost = [(-member.since, member.record.id) for member in silent if not member.record.leaving]
            self._cut_off = tuple(sorted(node_id for _, node_id in sorted(lost)[:MAX_CUT_OFF]))
        return self._cut_off

    def get(self, node_id: str) -> Member | None:
        """One node, or None."""
        return self._members.get(node_id)

    def on_linked(self, node_id: str, now: float) -> list[MemberChange]:
        """A link to a node is up. One that is unknown or gone becomes a member with the record that follows."""
        self._links[node_id] = self._links.get(node_id, 0) + 1
        member = self._members.get(node_id)
        if member is None or member.state is MemberState.GONE:
            return []
        return self._revive(member, now)

    def on_unlinked(self, node_id: str, now: float) -> list[MemberChange]:
        """A link to a node is down."""
        left = self._links.get(node_id, 0) - 1
        if left > 0:
            self._links[node_id] = left
            return []
        self._links.pop(node_id, None)
        member = self._members.get(node_id)
        if member is None:
            return []
        member.unlinked = True
        if member.record.leaving and member.state is not MemberState.GONE:
            return self._move(member, MemberState.GONE, now)
        return self._move(member, MemberState.SUSPECT, now) if member.state is MemberState.ALIVE else []

    def on_refused(self, node_id: str, now: float) -> list[MemberChange]:
        """Where its last link led to, nobody listens any more: its daemon has ended."""
        member = self._members.get(node_id)
        if member is None or node_id in self._links or member.state is not MemberState.SUSPECT:
            return []
        return self._move(member, MemberState.GONE, now)

    def on_record(self, record: NodeRecord, now: float) -> list[MemberChange]:
        """A node's record arrived over a link of its own. An older one than is known changes nothing.

        The first one after all links were down counts whatever its counter: a restarted node may have its clock, from
        which the counter is made, set back, and nothing older can be on its way.
        """
        member = self._members.get(record.id)
        if member is None:
            self._members[record.id] = Member(record, MemberState.ALIVE, now, now)
            self._there = None
            return [MemberChange(record.id, MemberState.ALIVE, joined=True)]
        newer = record.counter > member.record.counter or member.unlinked
        if newer:
            member.record, member.unlinked = record, False
            if self._there is not None and record.id in self._there:
                self._there[record.id] = record
            self._cut_off = None
        changes = self._revive(member, now)
        if newer and not changes and member.state is MemberState.ALIVE:
            changes = [MemberChange(record.id, member.state)]
        return changes

    def on_heard(self, node_id: str, now: float) -> list[MemberChange]:
        """A node said anything at all."""
        member = self._members.get(node_id)
        return self._revive(member, now) if member is not None else []

    def expel(self, node_id: str, now: float) -> list[MemberChange]:
        """A node is no member any more, whatever it says: it is gone at once."""
        member = self._members.get(node_id)
        return [] if member is None or member.state is MemberState.GONE else self._move(member, MemberState.GONE, now)

    def tick(self, now: float) -> list[MemberChange]:
        """Time passed: suspect who is silent, give up who was suspected for long, forget who is long gone."""
        changes: list[MemberChange] = []
        for member in list(self._members.values()):
            if member.state is MemberState.ALIVE and now - member.heard >= SUSPECT_SECONDS:
                changes += self._move(member, MemberState.SUSPECT, now)
            elif member.state is MemberState.SUSPECT and now - member.since >= GONE_SECONDS:
                changes += self._move(member, MemberState.GONE, now)
        self._forget(now)
        return changes

    def _revive(self, member: Member, now: float) -> list[MemberChange]:
        member.heard = now
        if member.state is MemberState.ALIVE or member.record.id not in self._links:
            return []
        was_gone = member.state is MemberState.GONE
        [change] = self._move(member, MemberState.ALIVE, now)
        return [MemberChange(change.node_id, change.state, joined=was_gone, heard_again=True)]

    def _move(self, member: Member, state: MemberState, now: float) -> list[MemberChange]:
        node_id, before = member.record.id, member.state
        member.state, member.since = state, now
        self._suspects = self._cut_off = None
        if state is MemberState.GONE:
            self._gone[node_id] = member
            if self._there is not None:
                del self._there[node_id]
        elif before is MemberState.GONE:
            del self._gone[node_id]
            self._there = None
        return [MemberChange(node_id, state)]

    def _forget(self, now: float) -> None:
        # One that hangs and keeps its link will not send its record again when it wakes: it stays.
        gone = [member for member in self._gone.values() if member.record.id not in self._links]
        # Who owned an instance has heirs, who must know of it, however many others went at the same time.
        gone.sort(key=lambda member: (bool(member.record.instances), member.since), reverse=True)
        for rank, member in enumerate(gone):
            if rank >= MAX_GONE or now - member.since > FORGET_SECONDS:
                del self._members[member.record.id], self._gone[member.record.id]
                self._cut_off = None
