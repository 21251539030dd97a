#include "cpu.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <algorithm>
#include <cmath>
#include <set>
#include <system_error>

#include "cpu_features.h"
#include "errors.h"
#include "os.h"

namespace qdeploy {
namespace {

struct Isa {
  const char* name;
  bool (*is_supported)(const CpuFeatures& cpu);  // asked where `below` is
  void (*init)(Kernels* kernels);
  const char* below;  // the instruction set whose table it starts from
};

// The ladder, from scalar upwards. avx512 stands on avx2, as few CPUs have both AVX_VNNI and AVX-512.
const Isa kLadder[] = {
    {"scalar", [](const CpuFeatures&) { return true; }, init_scalar, nullptr},
#if defined(__x86_64__)
    {"avx2", [](const CpuFeatures& cpu) { return cpu.avx2 && cpu.fma; }, init_avx2, "scalar"},
    {"avxvnni", [](const CpuFeatures& cpu) { return cpu.avx_vnni; }, init_avxvnni, "avx2"},
    {"avx512", [](const CpuFeatures& cpu) { return cpu.avx512f && cpu.avx512bw && cpu.avx512dq && cpu.avx512vl; },
     init_avx512, "avx2"},
    {"avx512vnni", [](const CpuFeatures& cpu) { return cpu.avx512_vnni; }, init_avx512vnni, "avx512"},
    {"amx", [](const CpuFeatures& cpu) { return cpu.amx_tile && cpu.amx_int8; }, init_amx, "avx512vnni"},
#elif defined(__aarch64__)
    {"neon", [](const CpuFeatures& cpu) { return cpu.asimd; }, init_neon, "scalar"},
    {"neondot", [](const CpuFeatures& cpu) { return cpu.asimddp; }, init_neondot, "neon"},
#endif
};

struct IsaKernels {
  std::string name;
  Kernels kernels;
};

const IsaKernels* find_isa(const std::vector<IsaKernels>& isas, const std::string& name) {
  for (const IsaKernels& isa : isas) {
    if (isa.name == name) return &isa;
  }
  return nullptr;
}

// The tables of the instruction sets that this CPU has, in the order of the ladder.
const std::vector<IsaKernels>& tables() {
  static const std::vector<IsaKernels> all = [] {
    const CpuFeatures cpu = cpu_features();
    std::vector<IsaKernels> built;
    for (const Isa& isa : kLadder) {
      const IsaKernels* below = isa.below ? find_isa(built, isa.below) : nullptr;
      if ((isa.below && !below) || !isa.is_supported(cpu)) continue;
      built.push_back({isa.name, below ? below->kernels : Kernels{}});
      isa.init(&built.back().kernels);
    }
    return built;
  }();
  return all;
}

// A file that the kernel writes, such as those of /proc; empty where there is none. A std::ifstream would do the same,
// and bring the locales of the C++ library into the wheels: 70 kB of 1.6 MB.
std::string text_of(const std::string& path) {
  std::string text;
  try {
    const os::File file(path);
    char piece[4096];
    for (size_t got; (got = file.read(text.size(), sizeof piece, piece)) > 0;) text.append(piece, got);
  } catch (const std::system_error&) {
  }
  return text;
}

// CPUs granted by one cgroup: "max 100000" or "150000 100000" of cgroup v2, two files of v1. Infinity without a quota.
double quota_of(const std::string& folder) {
  char quota[32];
  double period;
  if (sscanf(text_of(folder + "/cpu.max").c_str(), "%31s %lf", quota, &period) == 2) {
    return strcmp(quota, "max") == 0 ? INFINITY : atof(quota) / period;
  }
  const double value = atof(text_of(folder + "/cpu.cfs_quota_us").c_str());
  period = atof(text_of(folder + "/cpu.cfs_period_us").c_str());
  return value > 0 && period > 0 ? value / period : INFINITY;
}

// Calls visit(folder) for this process's cgroup and its parents, as far as they are seen, where they control `what`.
template <class Visit>
void for_each_cgroup(const std::string& root, const std::string& what, const Visit& visit) {
  const std::string groups = text_of(root + "/proc/self/cgroup");
  for (size_t begin = 0, end; begin < groups.size(); begin = end + 1) {
    end = std::min(groups.find('\n', begin), groups.size());
    const std::string line = groups.substr(begin, end - begin);  // id:controllers:path, no controllers in v2
    const size_t first = line.find(':'), second = line.find(':', first + 1);
    if (second == std::string::npos) continue;
    const std::string controllers = line.substr(first + 1, second - first - 1);
    const bool v2 = controllers.empty();
    if (!v2 && ("," + controllers + ",").find("," + what + ",") == std::string::npos) continue;
    const std::string mount = root + "/sys/fs/cgroup" + (v2 ? "" : "/" + what);
    // The path may be the host's, where the container sees its own cgroup as the mount: then no folder but that is
    // found.
    for (std::string path = line.substr(second + 1);; path.resize(path.rfind('/'))) {
      visit(mount + path);
      if (path.find('/') == std::string::npos) break;
    }
  }
}

}  // namespace

std::vector<std::string> available_isas() {
  std::vector<std::string> names;
  for (const IsaKernels& isa : tables()) names.push_back(isa.name);
  return names;
}

const Kernels& kernels_for(std::string isa) {
  std::string where = "isa";
  if (isa.empty()) {
    const char* variable = getenv("QDEPLOY_ISA");
    isa = variable ? variable : "";
    where = "QDEPLOY_ISA";
  }
  if (isa.empty()) isa = tables().back().name;
  if (const IsaKernels* found = find_isa(tables(), isa)) return found->kernels;
  std::string names;
  for (const std::string& name : available_isas()) names += (names.empty() ? "" : ", ") + name;
  throw InputError("expected an instruction set that this CPU has (" + names + "), got \"" + isa.substr(0, 60) +
                   "\" - at " + where);
}

double cpu_quota(const std::string& root) {
  double quota = INFINITY;
  for_each_cgroup(root, "cpu", [&](const std::string& folder) { quota = std::min(quota, quota_of(folder)); });
  return quota;
}

uint64_t memory_limit(const std::string& root) {
  uint64_t limit = os::memory_limit();
  for_each_cgroup(root, "memory", [&](const std::string& folder) {
    for (const char* file : {"/memory.max", "/memory.limit_in_bytes"}) {  // of v2, where it may be "max", and of v1
      const std::string text = text_of(folder + file);
      char* end;
      const uint64_t bytes = strtoull(text.c_str(), &end, 10);
      if (end != text.c_str()) limit = std::min(limit, bytes);
    }
  });
  return limit;
}

int default_threads() {
  std::set<std::string> cores;  // hyperthreads of one core share their list of siblings
  for (const int cpu : os::usable_cpus()) {
    const std::string number = std::to_string(cpu);
    const std::string siblings = text_of("/sys/devices/system/cpu/cpu" + number + "/topology/thread_siblings_list");
    cores.insert(siblings.empty() ? number : siblings);
  }
  const double limit = std::min(static_cast<double>(cores.size()), std::ceil(cpu_quota("")));
  return static_cast<int>(std::max(1.0, limit));
}

}  // namespace qdeploy
