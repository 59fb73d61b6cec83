"""The rules by which a walk steps into the bodies of scan, while, cond and shard_map."""

from collections.abc import Callable
from typing import Any, NamedTuple

from jax import lax
from jax.extend.core import JaxprEqn
from jax.sharding import PartitionSpec

from sqjax.program.subprograms import program_in, scan_in, shard_map_in
from sqjax.program.walk import Leaf, Rules, walk


class Bodies(NamedTuple):
    """What becomes of leaves on their way into a body.

    Attributes:
        per_step: (scan, leaf, its length) -> the leaf as a tree of arrays whose first axis is that of the steps.
        cut: (shard_map, leaf, its spec) -> the tree of the specs of its arrays.
        carried: (equation, operands that a loop carries) -> what it carries.
        outputs: a body's results -> what it returns.
    """

    per_step: Callable[[JaxprEqn, Leaf, int], Leaf]
    cut: Callable[[JaxprEqn, Leaf, PartitionSpec], Leaf]
    carried: Callable[[JaxprEqn, list[Any]], list[Any]]
    outputs: Callable[[list[Any]], list[Any]]


def body_rules(rules: Callable[[], Rules], leaves: Bodies) -> dict[str, Callable[..., list[Any]]]:
    """{primitive: its rule}. `rules()` gives the table for the bodies: the one that these rules become part of."""

    def run(program: Any, operands: Any) -> list[Any]:
        return leaves.outputs(walk(program.jaxpr, program.consts, operands, rules()))

    def scan(equation: JaxprEqn, *operands: Any) -> list[Any]:
        """A stacked leaf hands out one layer's arrays at each step."""
        found: Any = scan_in(equation)
        consts, carry, xs = found.sort(operands)
        xs = [leaves.per_step(equation, x, found.length) if isinstance(x, Leaf) else x for x in xs]

        def step(carry, slices):
            outputs = run(found.step, [*consts, *carry, *slices])
            return outputs[: found.carry], outputs[found.carry :]

        carry, ys = lax.scan(
            step, leaves.carried(equation, list(carry)), xs, length=found.length, **found.options
        )
        return [*carry, *ys]

    def shard_map(equation: JaxprEqn, *operands: Any) -> list[Any]:
        """Every device has its block of a leaf's arrays."""
        shards: Any = shard_map_in(equation)
        specs = [
            leaves.cut(equation, x, spec) if isinstance(x, Leaf) else spec
            for x, spec in zip(operands, shards.in_specs, strict=True)
        ]
        return shards.run(
            lambda *blocks: run(shards.block, blocks),
            tuple(specs),
            list(shards.out_specs),
            operands,
        )

    def while_loop(equation: JaxprEqn, *operands: Any) -> list[Any]:
        """Leaves are constants of the loop."""
        params = equation.params
        test, body = (program_in(equation, params[name]) for name in ("cond_jaxpr", "body_jaxpr"))
        split = params["cond_nconsts"], params["cond_nconsts"] + params["body_nconsts"]
        of_test, of_body, carry = (
            operands[: split[0]],
            operands[split[0] : split[1]],
            list(operands[split[1] :]),
        )
        return lax.while_loop(
            lambda carry: run(test, [*of_test, *carry])[0],
            lambda carry: run(body, [*of_body, *carry]),
            leaves.carried(equation, carry),
        )

    def cond(equation: JaxprEqn, index: Any, *operands: Any) -> list[Any]:
        """Each branch walks with the leaves it is given."""
        programs = [program_in(equation, branch) for branch in equation.params["branches"]]
        return lax.switch(
            index, [lambda program=program: run(program, operands) for program in programs]
        )

    return {"scan": scan, "shard_map": shard_map, "while": while_loop, "cond": cond}
