// What this CPU can execute: asked here, as the answer of a compiler's library depends on that library.
#pragma once

namespace qdeploy {

// Named as /proc/cpuinfo names them, each with the operating system's part: an instruction set whose registers it does
// not save is false. All of another architecture are false.
struct CpuFeatures {
  bool avx2, fma, avx_vnni, avx512f, avx512bw, avx512dq, avx512vl, avx512_vnni, amx_tile, amx_int8;  // x86-64
  bool asimd, asimddp;                                                                               // aarch64
};

CpuFeatures cpu_features();

}  // namespace qdeploy
