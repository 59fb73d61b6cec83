"""Which primitives only pass arrays on or move their elements: one table for all walks.

The walks differ in what they follow (views of leaves, labels, known constants, quantized weights),
so each has rules of its own. They must not differ in *which* primitives are harmless, because a
weight that one of them loses on its way is no site, or can not run in int8.
"""

#: Every result is the operand at the same position: the same numbers, shape and dtype.
#: `optimization_barrier` is the only one with several operands and results, so rules for these pair
#: operands with results.
COPIES = ("copy", "copy_p", "stop_gradient", "name", "optimization_barrier")

#: Only the type changes: it says that the numbers may differ between devices (`pvary`), or that
#: their sum over devices is meant. jax 0.10 has some of these names with "_p".
RETYPINGS = (
    "pvary",
    "reduced_vary_cast",
    "reduced_vary_cast_p",
    "vary_unreduced_cast",
    "vary_unreduced_cast_p",
)

#: The same numbers, laid out in another way in memory or over devices, or of another type there.
RESHARDINGS = (
    "sharding_constraint",
    "layout_constraint",
    "reshard",
    "mesh_cast",
    *RETYPINGS,
)

#: The results are the operands.
IDENTITIES = (*COPIES, *RESHARDINGS)

#: Every element of the result is an element of the one operand; shapes and parameters say which. A
#: number that fills the operand fills the result too.
MOVEMENTS = (
    "transpose",
    "reshape",
    "squeeze",
    "broadcast_in_dim",
    "slice",
    "rev",
)

#: A leaf times or by a number is the leaf, of which every element is that many times larger: at
#: which positions the leaf may stand, the number being the other operand.
MULTIPLES = {"mul": (0, 1), "div": (0,)}

#: What may be a leaf still, if not all of it: multiples, and a leaf that zeros mask.
SCALINGS = (*MULTIPLES, "select_n")

#: Elements of the first operand, at indices that are only known when the program runs.
PICKS = ("dynamic_slice", "gather")

#: What fills the operand fills the result, in the result's dtype.
KEEP_A_FILL = (*IDENTITIES, *MOVEMENTS, "convert_element_type")

#: Of concatenated weights each is changed alone, whatever its shape.
KEEP_JOINED = ("transpose", "convert_element_type", "copy", "name")

#: What norms begin with, element by element; and the square as `mul` of a weight by itself.
POWERS = ("abs", "square", "integer_pow")

#: Sums, differences and maxima of operands, element by element.
SUMS_AND_MAXIMA = ("add", "add_any", "sub", "max", "min")

#: Each element of the result is computed from the elements at the same place in the operands.
ELEMENTWISE = (*SUMS_AND_MAXIMA, "mul", "div", "select_n", "tanh")

#: A leaf plus or minus an array of its shape: products with it are sums of two products.
ADDITIONS = ("add", "sub")

#: Comparisons, element by element.
COMPARISONS = ("gt", "lt", "ge", "le", "eq", "ne")

#: Sums and maxima over whole axes, and running ones along an axis.
REDUCTIONS = ("reduce_sum", "reduce_max", "reduce_min")
RUNNING = ("cumsum", "cummax", "cummin")

#: Sums and maxima under a window that moves over an array.
POOLINGS = ("reduce_window_sum", "reduce_window_max", "reduce_window_min")

#: Updates written into an operand at indices that are only known when the program runs: in place of
#: its elements, added to them, or compared with them.
SCATTERS = (
    "scatter",
    "scatter-add",
    "scatter-sub",
    "scatter-min",
    "scatter-max",
)
