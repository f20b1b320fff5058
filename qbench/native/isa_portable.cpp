// Every CPU: plain loops.
#include "kernels.h"

namespace qb {
namespace on_portable {
#include "all_kernels.inc"
const Kernels table = QB_TABLE("portable");
}
const Kernels portable = on_portable::table;
}  // namespace qb
