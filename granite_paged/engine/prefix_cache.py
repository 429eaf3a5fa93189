"""Prompts with a common beginning compute it once.

The cache is a tree of token blocks. A node is one block after all those above it. Lookup compares
every token, so no hash decides. Prompts of different namespaces differ from their first block on. A
block is a multiple of the page size and of the model's alignment, where a Mamba state can be saved
and restored exactly.

::

    root ── block ── block ─┬─ block          pages   K and V of the block, shared by reference
                     state  └─ block          state   Mamba rows after the block

A prompt can start from a node with pages and, if the model has Mamba layers, a state. States are
large, so they are kept only where prompts part: where another waiting prompt leaves this one's
path, or at the last node that this prompt shares with earlier ones.

Invariant: a node with pages has a parent with pages. Its pages are one sequence of the allocator,
so they outlive the job that computed them. A node without pages, pending states, interest and
children is removed. Host only and without torch: a state is anything with `nbytes`.
"""

from __future__ import annotations

import contextlib
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from granite_paged.errors import require
from granite_paged.paging.allocator import PageAllocator

Block = tuple[int | str, ...]
"""Token ids, after the name of a namespace in the first block of its prompts."""


class Snapshot(Protocol):
    """Copy of one row's Mamba state."""

    @property
    def nbytes(self) -> int:
        """Return its size in bytes."""
        ...


@dataclass(slots=True, eq=False)
class Node:
    """One block of tokens after all those above it.

    Attributes:
        end: number of tokens up to the end of this block.
        interest: number of waiting prompts that go through it.
        pending_states: number of running prompts that will keep their state here.
        sequence: sequence of the allocator that holds the block's pages, if it has any.
    """

    tokens: Block
    parent: Node | None
    end: int
    children: dict[Block, Node] = field(default_factory=dict)
    interest: int = 0
    pending_states: int = 0
    sequence: int | None = None
    state: Snapshot | None = None

    @property
    def idle(self) -> bool:
        """Whether the node can be removed."""
        return not (
            self.children or self.interest or self.pending_states or self.sequence is not None
        )


@dataclass(frozen=True, slots=True)
class Hit:
    """What a prompt can start from: `tokens` tokens in `pages`, and the state after them."""

    tokens: int = 0
    pages: tuple[int, ...] = ()
    state: Snapshot | None = None


@dataclass(slots=True)
class PrefixStats:
    """What the cache did since it was made."""

    hits: int = 0
    misses: int = 0
    tokens_hit: int = 0
    tokens_asked: int = 0
    evicted_states: int = 0

    @property
    def hit_rate(self) -> float:
        """Return the share of prompt tokens that were not computed again."""
        return self.tokens_hit / self.tokens_asked if self.tokens_asked else 0.0


class PrefixCache:
    """Tree of token blocks with their pages and states.

    Args:
        allocator: owner of the pages.
        block: tokens per node; a multiple of the page size.
        stateful: whether the model has Mamba layers.
        budget: most bytes of states; 0 turns the cache off.
    """

    def __init__(
        self, allocator: PageAllocator, block: int, *, stateful: bool, budget: int
    ) -> None:
        require(block % allocator.page_size == 0, "a block is whole pages")
        self.block = block
        self.enabled = budget > 0
        self.stats = PrefixStats()
        self.state_bytes = 0
        self._allocator = allocator
        self.stateful = stateful
        self.budget = budget
        self._freed: list[int] = []  # pages that no call has returned yet
        self._unneeded: list[Node] = []  # nodes to be looked at again: removing them raised
        self._root = Node((), None, 0)
        # least recently used first; a parent is touched after its children, so it comes later
        self._with_pages: OrderedDict[Node, None] = OrderedDict()
        self._with_state: OrderedDict[Node, None] = OrderedDict()

    @property
    def pages(self) -> int:
        """Return the number of pages that the tree holds, shared with sequences or not."""
        return len(self._with_pages) * (self.block // self._allocator.page_size)

    @property
    def sequences(self) -> list[int]:
        """Return the sequences of the allocator that hold the tree's pages."""
        return [node.sequence for node in self._with_pages if node.sequence is not None]

    # -- before a prompt runs -------------------------------------------------------------------

    def announce(self, tokens: Sequence[int], namespace: str = "") -> list[Node]:
        """Note that a prompt waits. Return its path, which no other namespace shares.

        The last token is left out, because it must be computed for its logits.
        """
        starts = range(0, len(tokens) - self.block if self.enabled else 0, self.block)
        blocks = [self._key(tokens, start, namespace) for start in starts]
        node, path = self._root, []
        for start, block in zip(starts, blocks, strict=True):
            child = node.children.get(block)
            if child is None:
                child = node.children[block] = Node(block, node, start + self.block)
            child.interest += 1
            path.append(child)
            node = child
        return path

    def withdraw(self, path: Sequence[Node]) -> None:
        """Note that a prompt does not wait any more."""
        for node in path:
            node.interest -= 1
        self._remove_unneeded(path)

    def find(self, path: Sequence[Node]) -> Hit:
        """Return the longest cached beginning of a waiting prompt."""
        for depth in range(len(path), 0, -1):
            node = path[depth - 1]
            if node.sequence is not None and (node.state is not None or not self.stateful):
                return Hit(node.end, self._pages_of(path[:depth]), node.state)
        return Hit()

    def worth_waiting(self, path: Sequence[Node], hit: Hit) -> bool:
        """Return whether a running prompt will soon cache a longer prefix than `hit`."""
        return any(node.pending_states for node in path if node.end > hit.tokens)

    def checkpoints(self, path: Sequence[Node], hit: Hit) -> dict[int, Node]:
        """Return the nodes where a prompt should keep its state, by number of tokens.

        The prompt itself still counts as waiting.
        """
        beyond = [0] + [node.interest for node in reversed(path)]
        chosen = {}
        for node, below in zip(path, reversed(beyond[:-1]), strict=True):
            others_part_here = node.interest > max(below, 1)
            if node.end > hit.tokens and (others_part_here or self._parts_from_past(path, node)):
                chosen[node.end] = node
        return chosen

    def promise(self, nodes: Sequence[Node]) -> None:
        """Note that a prompt which starts now will keep its state at these nodes."""
        for node in nodes:
            node.pending_states += 1

    def unpromise(self, nodes: Sequence[Node]) -> None:
        """Note that a state was kept at each of these nodes, or will not be."""
        for node in nodes:
            node.pending_states -= 1
        self._remove_unneeded(nodes)

    def used(self, path: Sequence[Node], hit: Hit, tokens: int) -> None:
        """Count a prompt of `tokens` tokens that starts from `hit`, and mark the hit as used."""
        self.stats.hits += hit.tokens > 0
        self.stats.misses += hit.tokens == 0
        self.stats.tokens_hit += hit.tokens
        self.stats.tokens_asked += tokens
        if hit.tokens:
            self._touch(path[hit.tokens // self.block - 1])

    # -- after it ran ---------------------------------------------------------------------------

    def keep(
        self,
        tokens: Sequence[int],
        pages: Sequence[int],
        state: Snapshot | None = None,
        namespace: str = "",
    ) -> None:
        """Keep the whole blocks of `tokens`, which are stored in `pages`.

        A block that has pages keeps them: the contents are the same.

        Args:
            state: Mamba state after the last block.
            namespace: of the prompt that they begin.
        """
        node, per_block = self._root, self.block // self._allocator.page_size
        for number in range(len(tokens) // self.block if self.enabled else 0):
            block = self._key(tokens, number * self.block, namespace)
            own = pages[number * per_block : (number + 1) * per_block]
            node = self._keep_block(node, block, own)
        if node.end:
            self._touch(node)
            self._keep_state(node, state)

    def evict(self, free: int) -> list[int]:
        """Drop the least recently used blocks until `free` pages are free, or none is left.

        Returns:
            Pages that became free.
        """
        for node in list(self._with_pages) if self._allocator.free < free else ():
            if not self._in_use(node):
                self._drop_pages(node)
                if self._allocator.free >= free:
                    break
        return self._take_freed()

    def make_room(self, nbytes: int) -> bool:
        """Drop the least recently used states until `nbytes` more fit. Return whether they do."""
        if nbytes > self.budget:
            return False
        while self.state_bytes + nbytes > self.budget:
            self._drop_state(next(iter(self._with_state)))
            self.stats.evicted_states += 1
        return True

    def clear(self) -> list[int]:
        """Drop all pages and states. Return the pages that became free."""
        for node in list(self._with_pages):
            self._drop_pages(node)
        self._remove_unneeded([])
        return self._take_freed()

    def check_valid(self) -> None:
        """Prove the invariant; BrokenInvariant says what broke."""
        nodes = self._nodes()
        with_pages = {node for node in nodes if node.sequence is not None}
        require(set(self._with_pages) == with_pages, "prefix: pages and the list differ")
        with_state = {node for node in nodes if node.state is not None}
        require(set(self._with_state) == with_state, "prefix: states and the list differ")
        require(with_state <= with_pages, "prefix: a state without pages")
        counted = sum(node.state.nbytes for node in nodes if node.state is not None)
        require(counted == self.state_bytes, "prefix: bytes of states")
        require(self.state_bytes <= max(self.budget, 0), "prefix: states over budget")
        for node in nodes:
            require(not node.idle or bool(self._unneeded), "prefix: a node that is not needed")
            require(node.interest >= 0 and node.pending_states >= 0, "prefix: a count below zero")
            parent = node.parent
            rooted = parent is self._root or (parent is not None and parent.sequence is not None)
            require(rooted or node.sequence is None, "prefix: a block without the one before it")

    # -- details --------------------------------------------------------------------------------

    def _key(self, tokens: Sequence[int], start: int, namespace: str) -> Block:
        """Return a block's key. The first block of a namespace begins with its name."""
        block = tuple(tokens[start : start + self.block])
        return block if start or not namespace else (namespace, *block)

    def _keep_block(self, parent: Node, tokens: Block, pages: Sequence[int]) -> Node:
        node = parent.children.get(tokens)
        if node is None or node.sequence is None:
            sequence = self._allocator.open(pages)  # first: a refusal must leave no empty node
            node = node or Node(tokens, parent, parent.end + self.block)
            parent.children[tokens] = node
            node.sequence = sequence
            self._with_pages[node] = None
        return node

    def _parts_from_past(self, path: Sequence[Node], node: Node) -> bool:
        depth = node.end // self.block
        return node.sequence is not None and (depth == len(path) or path[depth].sequence is None)

    def _pages_of(self, path: Sequence[Node]) -> tuple[int, ...]:
        sequences = [node.sequence for node in path if node.sequence is not None]
        return tuple(page for sequence in sequences for page in self._allocator.pages_of(sequence))

    def _touch(self, node: Node) -> None:
        at: Node | None = node
        while at is not None and at is not self._root:
            for recent in (self._with_pages, self._with_state):
                if at in recent:
                    recent.move_to_end(at)
            at = at.parent

    def _keep_state(self, node: Node, state: Snapshot | None) -> None:
        if state is None or node.state is not None or not self.make_room(state.nbytes):
            return
        node.state = state
        self._with_state[node] = None
        self.state_bytes += state.nbytes

    def _in_use(self, node: Node) -> bool:
        if any(child.sequence is not None for child in node.children.values()):
            return True
        pages = self._pages_of([node])
        return any(self._allocator.references(page) > 1 for page in pages)

    def _drop_pages(self, node: Node) -> None:
        """Drop the pages of a node whose children have none, or of all nodes in order."""
        if node.sequence is None:
            return
        self._drop_state(node)  # first: pages without a state are valid
        self._freed += self._allocator.release(node.sequence)
        node.sequence = None
        del self._with_pages[node]
        self._remove_unneeded([node])

    def _take_freed(self) -> list[int]:
        freed, self._freed = self._freed, []
        # where a call before raised, some may have new owners
        return [page for page in freed if not self._allocator.references(page)]

    def _drop_state(self, node: Node) -> None:
        if node.state is not None:
            self.state_bytes -= node.state.nbytes
            node.state = None
            del self._with_state[node]

    def _remove_unneeded(self, nodes: Sequence[Node]) -> None:
        """Remove those of these nodes that are not needed; after a fault, at the next call."""
        self._unneeded += nodes
        with contextlib.suppress(Exception):
            while self._unneeded:
                self._prune(self._unneeded[-1])
                self._unneeded.pop()

    def _prune(self, node: Node) -> None:
        at = node
        while at.parent is not None and at.idle and at.parent.children.get(at.tokens) is at:
            del at.parent.children[at.tokens]
            at = at.parent

    def _nodes(self) -> list[Node]:
        found = list(self._root.children.values())
        for node in found:  # grows as it goes
            found += node.children.values()
        return found
