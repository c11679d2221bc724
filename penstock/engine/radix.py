"""Another block ledger: prefixes are kept in a radix tree, as SGLang keeps them.

A node of the tree is a run of blocks with one history; the path to it says what its positions hold. Names are the same
hashes as in engine.ledger, so a block is a page of the tree, and adapters and salts, which every hash begins with, are
its namespaces. With blocks of one position it matches token by token.

What differs from the ledger with hashes, everything else is the same and the same code:

    when     a prompt enters the tree when a chunk of it has been computed, an answer when its job ends or leaves.
             So nobody shares what the same step still has to write
    copies   what is there already when a job's blocks enter is not kept twice: the job goes on with the blocks of the
             tree and gives its own back (`register` answers that its table has changed)
    nodes    are cut where a job turns off and never joined again; each chunk makes one, and so does an answer. The lock
             count of a node is the number of jobs that hold it, which is the number of those that ended below
    leaves   memory is made from whole nodes that nothing follows and nobody holds, until there is enough. Which, says
             the `blocks` policy; with lru that which was walked along longest ago. What a policy chooses takes with it
             all that follows it
    facts    a policy may rank nodes by: the last walk along it (`used_at`), when it was made or cut off (`made_at`),
             how many jobs came along (`hits`), the highest priority among them (one more where prompts have ended)

Looking up (forks, `lpm`) leaves no trace; being admitted, each chunk and the end are walks. A walk also touches the
rest of a node that is cut by it.

Source: SGLang's radix cache (sglang 0.5.23, srt/mem_cache/radix_cache.py, evict_policy.py), own code; a test replays
recorded walks of it. Where we differ: SGLang's order policies touch what they look up; SGLang throws away what a
retracted job wrote, here it enters the tree like an answer; several answers to one prompt that start in one step are
computed each, where SGLang computes the prompt once before it starts them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence

from penstock.core.types import BlockHash, Job
from penstock.engine.ledger import BlockLedger
from penstock.engine.radix_node import IdleNodes, Node
from penstock.engine.run import IdleItem, Rank, Run, num_alike


class RadixLedger(BlockLedger):
    """See the module's text, and engine.ledger for the interface."""

    def __init__(
        self, num_blocks: int, block_size: int = 16, *, has_prefix_cache: bool = True
    ) -> None:
        super().__init__(num_blocks, block_size, has_prefix_cache=has_prefix_cache)
        self.names_ahead = False
        self.root = Node([], None, 0)
        self._idle: IdleNodes = IdleNodes()
        self._given: dict[
            int, int
        ] = {}  # positions each job was given; what follows it writes itself
        self._counted: set[int] = set()  # jobs that are among the hits of what they adopted
        self._clock = 0

    def _tick(self) -> int:
        self._clock += 1
        return self._clock

    def keeps_order(self, rank: Rank) -> bool:
        self._idle.rate_all(rank)
        return True

    def idle_items(self) -> Iterator[IdleItem]:
        """Nodes nobody holds, from the longest unused to the latest; what follows one stands before it."""
        return iter(self._idle.nodes())

    # ------------------------------------------------------------------ looking up

    def find(self, hashes: list[BlockHash], start: int, limit: int) -> dict[Run, int]:
        found: dict[Run, int] = {}
        limit, node, at = min(limit, len(hashes)), self.root, 0
        while at < limit:
            child = node.children.get(hashes[at])
            if child is None:
                break
            most = min(len(child.blocks), limit - at)
            size = num_alike(child.hashes(most), hashes[at : at + most])
            at += size
            if at > start:
                found[child] = size
            if size < len(child.blocks):
                break
            node = child
        return found

    def adopt(self, job: Job) -> int:
        before = self.registered.get(job.seq, 0)
        computed = super().adopt(job)
        self._given[job.seq] = job.known
        if self.registered[job.seq] > before:
            self._touch(job)
        return computed

    def _split(self, run: Run, size: int) -> Run:
        assert isinstance(run, Node)
        run.used_at = self._tick()
        begin = run.fork_at(size, self._tick())
        self._starts[begin.blocks[0]], self._starts[run.blocks[0]] = begin, run
        if not run.refs:
            self._idle.put_behind(begin, run)
            self._idle.move_to_end(run)
        return begin

    def _touch(self, job: Job, importance: int | None = None) -> None:
        """A walk along all that the job holds in the tree."""
        last = self._last.get(job.seq)
        if last is None:
            return
        assert isinstance(last, Node)
        used_at = self._tick()
        for node in last.up():
            node.used_at = used_at
            if importance is not None:
                node.priority = max(node.priority, importance)

    # ------------------------------------------------------------------ entering the tree

    def register(self, job: Job, upto: int) -> bool:
        """Enter a chunk of what the job was given; what it wrote itself waits for its end."""
        given = self._given.get(job.seq)
        return (given is None or upto <= given) and self._insert(job, upto // self.block_size)

    def _insert(self, job: Job, full: int) -> bool:
        """Enter the first `full` blocks of the job; whether some of them were there already, as other blocks."""
        seq, hashes = job.seq, job.hashes
        if seq not in self._counted:
            self._counted.add(seq)
            self._count(job)
        full, at = min(full, len(hashes)), self.registered.get(seq, 0)
        is_changed = False
        while at < full:
            node, is_known = self._enter(job, at, full)
            node.hits += 1
            is_changed |= is_known
            at += len(node.blocks)
            self.registered[seq], self._last[seq] = at, node
        self._touch(job, -job.priority)
        num_prompt = job.num_prompt // self.block_size
        if 0 < num_prompt < at:
            self._part_prompt(job, num_prompt)
        return is_changed

    def _enter(self, job: Job, at: int, full: int) -> tuple[Node, bool]:
        """The next node of the job, which holds it from now on; whether it was there."""
        table, hashes = self.tables[job.seq], job.hashes
        last = self._last.get(job.seq, self.root)
        assert isinstance(last, Node)
        found = last.children.get(hashes[at])
        if found is None:
            blocks = table[at:full]
            fresh = Node(blocks, hashes, at, refs=1, parent=last, made_at=self._tick())
            fresh.priority = -job.priority
            self._starts[blocks[0]] = fresh
            self.news.name(fresh)
            return fresh, False
        most = min(len(found.blocks), full - at)
        size = num_alike(found.hashes(most), hashes[at : at + most])
        node = found if size == len(found.blocks) else self._split(found, size)
        assert isinstance(node, Node)
        if not node.refs:
            self._idle.remove(node)
        node.refs += 1
        self._unused += reversed(table[at : at + size])
        table[at : at + size] = node.blocks
        return node, True

    def _count(self, job: Job) -> None:
        last = self._last.get(job.seq)
        if isinstance(last, Node):
            for node in last.up():
                node.hits += 1

    def _part_prompt(self, job: Job, num_prompt: int) -> None:
        """Cut the path where the prompt ends, so that an answer can go without it; the prompt is worth one more."""
        last = self._last[job.seq]
        assert isinstance(last, Node)
        end = self.registered[job.seq]
        for node in last.up():
            begin = end - len(node.blocks)
            if begin < num_prompt < end:
                self._split(node, num_prompt - begin)
                begin = num_prompt
            if end <= num_prompt:
                node.priority = max(node.priority, 1 - job.priority)
            end = begin
        self._touch(job)

    # ------------------------------------------------------------------ giving blocks back

    def release(self, job: Job, computed: int | None = None) -> int:
        seq, before = job.seq, self.free
        if computed is not None and seq in self.tables:
            self._insert(job, computed // self.block_size)
        table = self.tables.pop(seq, [])
        named = self.registered.pop(seq, 0)
        last = self._last.pop(seq, None)
        self._given.pop(seq, None)
        self._counted.discard(seq)
        self._unused += reversed(table[named:])
        if isinstance(last, Node):
            for node in list(last.up()):
                self._let_go(node)
        return self.free - before

    def _let_go(self, node: Node) -> None:
        if node.refs > 1:
            node.refs -= 1
        elif self.has_prefix_cache:
            node.refs = 0
            node.keep_own_names()
            self._idle.append(node)
        else:
            self._drop(node)

    def disown(self, job: Job, start: int) -> set[int]:
        """Nothing was entered that is not computed, so there is nothing to forget."""
        assert self.registered.get(job.seq, 0) * self.block_size <= start, "entered before computed"
        return set(self.tables[job.seq][start // self.block_size :])

    def _forget(self, run: Run) -> None:
        assert isinstance(run, Node)
        self.news.forget(run)
        parent = run.leave()
        if not parent.refs and parent is not self.root:
            self._idle.rate(parent)

    def _empty(self, short: int) -> None:
        if self.choose_idle is not None:
            self._empty_chosen(self.choose_idle(short))
            return
        while short > 0:
            leaf = self._idle.next_leaf()
            short -= len(leaf.blocks)
            self._idle.remove(leaf)
            self._drop(leaf)

    def _empty_chosen(self, chosen: Sequence[int]) -> None:
        for number in chosen:
            found = self._starts.get(number)
            if found is None:  # it went with what it followed
                continue
            assert isinstance(found, Node) and not found.refs, (
                "the policy chose a node that is held"
            )
            for node in found.down():
                self._idle.remove(node)
                self._drop(node)

    # ------------------------------------------------------------------ invariants

    def check(self) -> None:
        super().check()
        self._idle.check()
        nodes = list(self.root.down())[:-1]
        assert {id(node) for node in nodes} == {id(run) for run in self._starts.values()}
        below: Counter[int] = Counter()
        for node in nodes:
            parent = node.parent
            assert parent is not None and parent.children.get(node.key) is node, "a torn path"
            below[id(parent)] += node.refs
            if parent is not self.root:
                assert parent.refs >= below[id(parent)], "a lock count is less than those below"
                assert parent.used_at >= node.used_at, "who walks to a node passes what it follows"
        assert not self.index and not self._twins, "names are found in the tree"
        known = self._counted | self._given.keys()
        assert known <= self.tables.keys(), "a job that has left is remembered"
