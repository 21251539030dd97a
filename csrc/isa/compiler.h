// What the kernels ask of the compiler. Macros and types alone: ukernels.h says why their files share no inline code.
#pragma once

// A function that becomes a part of its callers: what it gets by reference stays in registers.
#define QD_INLINE inline __attribute__((always_inline))

// A loop of at most 16 rounds, their number known to the compiler, written out: what it indexes stays in registers.
#define QD_UNROLL _Pragma("GCC unroll 16")

namespace qdeploy {
namespace {  // internal linkage: each file compiles its own copy with its own -m flags

// What a residual is: uint8_t or int16_t, its codes, or these added to inner codes, or none.
struct None {};
template <class Code>
struct WithInner {};

template <class T>
constexpr bool kIsNone = false;
template <>
constexpr bool kIsNone<None> = true;
template <class T>
constexpr bool kHasInner = false;
template <class Code>
constexpr bool kHasInner<WithInner<Code>> = true;

template <class T>
struct CodeOf {
  using type = T;
};
template <class Code>
struct CodeOf<WithInner<Code>> {
  using type = Code;
};

}  // namespace
}  // namespace qdeploy
