"""The page about families, from the family files themselves: ``python -m trawl.families > docs/families.md``."""

from __future__ import annotations

from collections.abc import Iterator
from importlib import resources

from trawl.families.description import GENERIC, KINDS, Family, Tower, packaged_families

HEAD = """# Families

Which matrices of which architectures TRAWL finds. Made by `python -m trawl.families > docs/families.md` from the files
in `trawl/families/`; a test keeps it current. Any other layout goes by `--family FILE.yaml`, in the language that
`trawl/families/description.py` explains; a model that is stored like llama is recognised without a file.

## Roles

`--roles` takes kinds, single roles, or both, separated by commas; `all` is every role of every layer.

| kind | roles | what they are |
|---|---|---|
"""
MEANINGS = {
    "attn": "attention within a layer; `q_a q_b kv_a kv_b` are deepseek's low-rank projections, `pos_q pos_k` those of "
    "deberta's relative positions",
    "cross": "attention to another tower: a decoder's to its encoder, blt's between bytes and patches",
    "ssm": "a state-space mixer: input, gate, what gives the step and the states, the step, output",
    "fc": "the FC that every token passes, shared experts among them",
    "experts": "routed experts; those of one layer are one stack, whatever `--group-layers` says; routers in no role",
}
BODY = """
Outside the layers, `embed` and `lm_head` are roles of the families that name them. Matrices of different kinds, towers
or shapes never share a stack.

**Towers.** Where layers do not follow one another (encoder and decoder, text and vision), they are numbered through all
towers in the order given here: of a bart with six and six layers, `--layers 6-11` is the decoder. A tower stored
alone, such as a T5 encoder, is found alone.

**Experts.** A checkpoint keeps its layout, one tensor an expert or all of them in one. transformers 5 renames and fuses
many of them while loading; either way of storing is found. All of transformers' expert modules multiply by one fused
parameter, for which factors cannot stand in, so that experts are written with `--write dense`; `--write factored`
refuses them, and goes with `--roles attn,fc`. Other roles are factored in every family here.

## Architectures

"Together" are roles that share a tensor, which its view cuts apart.

| model types | tower | roles | together |
|---|---|---|---|
"""
TAIL = """
Not among them: internlm2, which transformers has no modelling code for. `gemma3` is its language model, alone or in the
wrapper, whose vision tower passes through. Convolutions, norms, biases, position tables and routers always do.

## How each is stored

"""


def render() -> str:
    """Return the page as Markdown."""
    families = [family for name, family in packaged_families().items() if name != GENERIC]
    kinds = [f"| `{kind}` | {_words(roles)} | {MEANINGS[kind]} |\n" for kind, roles in KINDS.items()]
    rows = [row for family in families for row in _rows(family)]
    notes = [f"- **{family.name}**: {_comment(family)}\n" for family in families]
    return "".join([HEAD, *kinds, BODY, *rows, TAIL, *notes])


def _rows(family: Family) -> Iterator[str]:
    """Yield one line of the table for each tower."""
    for number, tower in enumerate(family.towers):
        types = ", ".join(family.model_types) if number == 0 else ""
        names = [*(role.name for role in tower.roles), *(role for role, _ in family.outside if number == 0)]
        together = "; ".join(_words(group) for group in _together(tower)) or "none"
        yield f"| {types} | {tower.name or 'one'} | {_words(names)} | {together} |\n"


def _together(tower: Tower) -> list[list[str]]:
    """Return the roles that are cut from one tensor."""
    groups: dict[str, list[str]] = {}
    for role in tower.roles:
        for way in role.ways:
            group = groups.setdefault(way.tensors[0], [])
            if way.take:
                group.append(role.name)
    return [group for group in groups.values() if len(group) > 1]


def _words(names: tuple[str, ...] | list[str]) -> str:
    """Write names as code."""
    return "`" + " ".join(names) + "`"


def _comment(family: Family) -> str:
    """Return what stands at the top of a family's file."""
    text = (resources.files(__package__) / f"{family.name}.yaml").read_text(encoding="utf-8")
    lines = []
    for line in text.splitlines():
        if not line.startswith("#"):
            break
        lines.append(line.removeprefix("#").strip())
    return " ".join(lines)
