// All kernels of one instruction set; included inside its namespace, after its vectors.
#include "vector_math.inl"
#include "rows.inl"
#include "scales.inl"
#include "product.inl"
#include "attention.inl"
#include "unpacked_rows.inl"

static const Kernels table = {kName,  prepare, gate, add_to, scale_and_cap, product, ready_heads,
                              attend, rows,    to_wire, from_wire, summarize};
