"""The mutants of a module: cosmic-ray's operators, at every place where a change could matter.

Left out are annotations, decorators, imports for type checkers, the texts of errors, and
`strict=True` of zip, which asserts what holds. Of the replacements of one operator only the nearest
are taken: a suite that sees `<=` for `<` also sees `==`, and counting both would only raise the
score.
"""

from __future__ import annotations

import ast
import hashlib
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from cosmic_ray.ast import ast_nodes, get_ast
from cosmic_ray.mutating import mutate_code
from cosmic_ray.operators.provider import OperatorProvider

OPERATORS = (
    "NumberReplacer",
    "AddNot",
    "ZeroIterationForLoop",
    "ExceptionReplacer",
    "ReplaceTrueWithFalse",
    "ReplaceFalseWithTrue",
    "ReplaceAndWithOr",
    "ReplaceOrWithAnd",
    "ReplaceBreakWithContinue",
    "ReplaceContinueWithBreak",
    *(f"ReplaceUnaryOperator_Delete_{name}" for name in ("Not", "USub", "Invert")),
    *(
        f"ReplaceBinaryOperator_{names}"
        for names in (
            *("Add_Sub", "Sub_Add", "Mul_Add", "Div_Mul", "FloorDiv_Mul", "Mod_FloorDiv"),
            *("Pow_Mul", "RShift_LShift", "LShift_RShift"),
            *("BitOr_BitAnd", "BitAnd_BitOr", "BitXor_BitAnd"),
        )
    ),
    *(
        f"ReplaceComparisonOperator_{names}"
        for names in (
            *("Lt_LtE", "Lt_GtE", "LtE_Lt", "LtE_Gt", "Gt_GtE", "Gt_LtE", "GtE_Gt", "GtE_Lt"),
            *("Eq_NotEq", "NotEq_Eq", "Is_IsNot", "IsNot_Is"),
        )
    ),
)

Span = tuple[tuple[int, int], tuple[int, int]]  # (line from 1, column from 0): begin, end


class Mutant(NamedTuple):
    """One change of one module.

    Attributes:
        module: path from the root of the project.
        operator: name of cosmic-ray's operator.
        occurrence: which of the operator's places in the module, from 0.
        line: line of the change, from 1.
        lines: first and last line of the statement, or of its head, that is changed.
        function: qualified name of the function or class around it; empty at module level.
        imported: whether the statement runs when the module is imported.
        source: the text of the line.
        copy: how many mutants before it have the same operator, function and text of the line.
    """

    module: str
    operator: str
    occurrence: int
    line: int
    lines: tuple[int, int]
    function: str
    imported: bool
    source: str
    copy: int

    def rank(self, seed: int) -> str:
        """Return a key to sample by, which does not depend on code elsewhere in the module."""
        text = f"{seed} {self.module} {self.function} {self.operator} {self.source} {self.copy}"
        return hashlib.sha256(text.encode()).hexdigest()


class _Scope(NamedTuple):
    span: tuple[int, int]
    function: str
    imported: bool


def _scopes(node: ast.AST, names: tuple[str, ...] = (), imported: bool = True) -> Iterator[_Scope]:
    """Yield every statement of a tree, outer ones first. Of one with a body, only its head."""
    for child in ast.iter_child_nodes(node):
        within, runs = names, imported
        if isinstance(child, ast.stmt):
            body = [*ast.iter_child_nodes(child)]
            inner = [part.lineno for part in body if isinstance(part, ast.stmt | ast.ExceptHandler)]
            end = min(inner) - 1 if inner else (child.end_lineno or child.lineno)
            if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                within = (*names, child.name)
            yield _Scope((child.lineno, max(end, child.lineno)), ".".join(within), runs)
            runs = runs and not isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef)
        elif isinstance(child, ast.ExceptHandler):
            yield _Scope((child.lineno, child.lineno), ".".join(names), imported)
        yield from _scopes(child, within, runs)


def _span(node: ast.expr | ast.stmt) -> Span:
    end = (node.end_lineno or node.lineno, node.end_col_offset or 0)
    return (node.lineno, node.col_offset), end


def _left_out(tree: ast.Module) -> Iterator[Span]:
    """Yield the parts of a module whose changes cannot matter."""
    for node in ast.walk(tree):
        if isinstance(node, ast.AnnAssign | ast.arg) and node.annotation:
            yield _span(node.annotation)
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield from (_span(decorator) for decorator in node.decorator_list)
            if not isinstance(node, ast.ClassDef) and node.returns:
                yield _span(node.returns)
        elif isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            yield _span(node)
        elif isinstance(node, ast.keyword) and node.arg == "strict":
            yield _span(node.value)
        elif isinstance(node, ast.Raise):
            yield from (_span(part) for part in ast.walk(node) if isinstance(part, ast.JoinedStr))


def _gaps(tree: ast.Module) -> Iterator[Span]:
    """Yield what is between the operands of each binary operator.

    cosmic-ray also takes the star of `def f(*, x)` and of `{**x}` for one.
    """
    for node in ast.walk(tree):
        if isinstance(node, ast.BinOp):
            yield _span(node.left)[1], _span(node.right)[0]


def mutants(root: Path, module: str) -> list[Mutant]:
    """Return the mutants of a module, in the order of operators."""
    source = (root / module).read_text(encoding="utf-8")
    tree = ast.parse(source)
    lines = source.split("\n")
    left_out, gaps, scopes = list(_left_out(tree)), list(_gaps(tree)), list(_scopes(tree))
    provider, nodes = OperatorProvider(), list(ast_nodes(get_ast(source)))
    found: list[Mutant] = []
    copies: Counter[tuple[str, str, str]] = Counter()
    for operator in OPERATORS:
        visitor = provider[operator]()
        places = [place for node in nodes for place in visitor.mutation_positions(node)]
        for occurrence, (begin, _) in enumerate(places):
            if any(start <= begin < end for start, end in left_out):
                continue
            binary = operator.startswith("ReplaceBinaryOperator")
            if binary and not any(start <= begin < end for start, end in gaps):
                continue
            line = begin[0]
            around = [scope for scope in scopes if scope.span[0] <= line <= scope.span[1]]
            scope = around[-1] if around else _Scope((line, line), "", imported=True)
            text = lines[line - 1].strip()
            copies[key := (operator, scope.function, text)] += 1
            mutant = Mutant(module, operator, occurrence, line, *scope, text, copies[key])
            if ":=" not in text or _is_python(mutate(root, mutant)[0]):
                found.append(mutant)
    return found


def _is_python(source: str) -> bool:
    """Whether a text parses. cosmic-ray negates `x := y` without parentheses."""
    try:
        ast.parse(source)
    except SyntaxError:
        return False
    return True


def mutate(root: Path, mutant: Mutant) -> tuple[str, str]:
    """Return the changed text of the module, and that of the line."""
    source = (root / mutant.module).read_text(encoding="utf-8")
    operator = OperatorProvider()[mutant.operator]()
    text = mutate_code(source, operator, mutant.occurrence)
    assert text is not None, mutant
    line = text.split("\n")[mutant.line - 1]
    # cosmic-ray writes one space too many before what it puts in
    line = re.sub(r"(?<=[(\[{]) +", "", line.strip())
    return text, re.sub(r" {2,}", " ", line)
