// Checks every kernel of every instruction set of this CPU against the scalar table, bit for bit; `--bench` times them.
//
// Inputs lie against an inaccessible page with exactly the slack the contract grants (kOverread), alternately at their
// end and at their start, so a read beyond it crashes; the slack holds random bytes, so using them shows. Outputs are
// compared with all that surrounds them. The first case that differs is printed with all its parameters; exit status 1.
//
// Built by `cmake --build <folder> --target check_ukernels`, or by hand,
// F="-std=c++17 -O3 -ffp-contract=off -Icsrc":
//   g++ $F -c csrc/isa/scalar.cc
//   g++ $F -mavx2 -mfma -c csrc/isa/avx2.cc csrc/isa/avxvnni.cc
//   g++ $F -mavx2 -mfma -DQDEPLOY_AVXVNNI_AS_EVEX -c csrc/isa/avxvnni.cc -o avxvnni_as_evex.o
//   g++ $F -mavx2 -mfma -mavx512f -mavx512bw -mavx512dq -mavx512vl -c csrc/isa/avx512.cc
//   g++ $F -mavx2 -mfma -mavx512f -mavx512bw -mavx512dq -mavx512vl -mavx512vnni -c csrc/isa/avx512vnni.cc
//   g++ $F -mavx2 -mfma -mavx512f -mavx512bw -mavx512dq -mavx512vl -mamx-tile -mamx-int8 -c csrc/isa/amx.cc
//   g++ $F -c csrc/{cpu,cpu_features,os_posix,norm,attention,gather}.cc
//   g++ $F tests/cpp/check_{ukernels,conv,winograd,depthwise,pool,elementwise,input,lsq,rows,norm,attention}.cc *.o
// On aarch64, instead of the avx files: csrc/isa/neon.cc, and csrc/isa/neondot.cc with -march=armv8.2-a+dotprod.
#include "check_ukernels.h"
#include "cpu.h"
#include "cpu_features.h"

#include <csignal>
#include <string>

namespace qdeploy {
void init_avxvnni_as_evex(Kernels* kernels);  // what init_avxvnni gives, in the encoding of AVX-512
}

using namespace qdeploy;

namespace {

const Family* const kFamilies[] = {&kConvFamily,        &kWinogradFamily, &kDepthwiseFamily, &kPoolFamily,
                                   &kElementwiseFamily, &kInputFamily,    &kLsqFamily,       &kRowsFamily,
                                   &kNormFamily,        &kAttentionFamily};

void report_crash(int signal) {  // not async-signal-safe, but nothing of value can be lost here
  printf("CRASHED (signal %d)\n  %s\n", signal, current_case);
  fflush(stdout);
  _exit(1);
}

// The tables of this CPU from scalar upwards, and AVX-VNNI in its EVEX form where the CPU has that.
std::vector<Kernels> tables() {
  std::vector<Kernels> all;
  for (const std::string& isa : available_isas()) all.push_back(kernels_for(isa));
#if defined(__x86_64__)
  if (cpu_features().avx512vl && cpu_features().avx512_vnni) {
    all.push_back(kernels_for("avx2"));
    init_avxvnni_as_evex(&all.back());
    all.back().isa = "avxvnni in EVEX form";
  }
#endif
  return all;
}

bool check(const Kernels& kernels) {
  for (const Family* family : kFamilies)
    if (!family->check(kernels_for("scalar"), kernels)) return false;
  printf("%s: all kernels equal scalar\n", kernels.isa);
  return true;
}

}  // namespace

int main(int argc, char** argv) {
  signal(SIGSEGV, report_crash);
  signal(SIGILL, report_crash);
  const bool bench = argc > 1 && strcmp(argv[1], "--bench") == 0;
  for (const Kernels& kernels : tables()) {
    if (!bench && !check(kernels)) return 1;
    if (bench)
      for (const Family* family : kFamilies) family->bench(kernels);
  }
  return 0;
}
