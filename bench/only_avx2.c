// Hides every instruction set beyond AVX2 from the process that loads it, so that any runtime shows what it does on a
// CPU without AVX-512 and VNNI:
//
//     cc -shared -fPIC -O2 -o only_avx2.so only_avx2.c  &&  LD_PRELOAD=./only_avx2.so program
//
// The kernel lets CPUID fault; the handler runs the instruction and clears what is hidden from its answer. Where the CPU
// cannot fault there, the program ends at once with status 77.
#define _GNU_SOURCE
#include <cpuid.h>
#include <signal.h>
#include <stdio.h>
#include <sys/syscall.h>
#include <ucontext.h>
#include <unistd.h>

enum { kArchSetCpuid = 0x1012, kUnsupported = 77 };

// Of leaf 7: AVX512 F, DQ, IFMA, PF, ER, CD, BW, VL in EBX; VBMI, VBMI2, VNNI, BITALG, VPOPCNTDQ in ECX; 4VNNIW, 4FMAPS,
// VP2INTERSECT, AMX and FP16 in EDX. Of its subleaf 1: AVX-VNNI, AVX512-BF16, AMX-FP16, AVX-IFMA in EAX; AVX-VNNI-INT8,
// AVX-NE-CONVERT, AMX-COMPLEX, AVX-VNNI-INT16, AVX10 in EDX.
static const unsigned kEbx = 1u << 16 | 1u << 17 | 1u << 21 | 1u << 26 | 1u << 27 | 1u << 28 | 1u << 30 | 1u << 31;
static const unsigned kEcx = 1u << 1 | 1u << 6 | 1u << 11 | 1u << 12 | 1u << 14;
static const unsigned kEdx = 1u << 2 | 1u << 3 | 1u << 8 | 1u << 22 | 1u << 23 | 1u << 24 | 1u << 25;
static const unsigned kEax1 = 1u << 4 | 1u << 5 | 1u << 21 | 1u << 23;
static const unsigned kEdx1 = 1u << 4 | 1u << 5 | 1u << 8 | 1u << 10 | 1u << 19;

static struct sigaction before;

static long let_cpuid_run(int yes) { return syscall(SYS_arch_prctl, kArchSetCpuid, yes); }

static void on_fault(int signal, siginfo_t* info, void* context) {
  greg_t* registers = ((ucontext_t*)context)->uc_mcontext.gregs;
  const unsigned char* code = (const unsigned char*)registers[REG_RIP];
  (void)signal, (void)info;
  if (code[0] != 0x0f || code[1] != 0xa2) {  // another fault: as if this handler were not there
    sigaction(SIGSEGV, &before, NULL);
    return;
  }
  const unsigned leaf = (unsigned)registers[REG_RAX], subleaf = (unsigned)registers[REG_RCX];
  unsigned a, b, c, d;
  let_cpuid_run(1);
  __cpuid_count(leaf, subleaf, a, b, c, d);
  let_cpuid_run(0);
  if (leaf == 7 && subleaf == 0) b &= ~kEbx, c &= ~kEcx, d &= ~kEdx;
  if (leaf == 7 && subleaf == 1) a &= ~kEax1, d &= ~kEdx1;
  registers[REG_RAX] = a, registers[REG_RBX] = b, registers[REG_RCX] = c, registers[REG_RDX] = d;
  registers[REG_RIP] += 2;
}

__attribute__((constructor)) static void hide(void) {
  struct sigaction action = {0};
  action.sa_sigaction = on_fault;
  action.sa_flags = SA_SIGINFO | SA_NODEFER;
  sigaction(SIGSEGV, &action, &before);
  if (let_cpuid_run(0) != 0) {
    fputs("this CPU cannot let CPUID fault\n", stderr);
    _exit(kUnsupported);
  }
}
