// What the kernels ask of the compiler. Macros and types alone: ukernels.h says why their files share no inline code.
#pragma once

// A function that becomes a part of its callers: what it gets by reference stays in registers.
#define QD_INLINE inline __attribute__((always_inline))

// A loop of at most 16 rounds, their number known to the compiler, written out: what it indexes stays in registers.
#define QD_UNROLL _Pragma("GCC unroll 16")

namespace qdeploy {
namespace {  // internal linkage: each file compiles its own copy with its own -m flags

// The type of the codes of a residual, where there is none.
struct None {};
template <class T>
constexpr bool kIsNone = false;
template <>
constexpr bool kIsNone<None> = true;

}  // namespace
}  // namespace qdeploy
