// What this machine offers: instruction sets and threads.
#pragma once
#include <string>
#include <vector>

#include "ukernels.h"

namespace qdeploy {

// Names of the instruction sets that this CPU and its operating system can run, from scalar upwards.
std::vector<std::string> available_isas();

// The kernels of `isa`; empty: the value of QDEPLOY_ISA, or the best available. Throws InputError for any other.
const Kernels& kernels_for(std::string isa);

// CPUs that the quotas of this process's cgroup and its parents grant, v1 or v2; infinity without one. /proc and /sys
// lie under `root`: tests give a tree of their own.
double cpu_quota(const std::string& root);

// min(affinity, cpu_quota, physical cores among them), at least 1.
int default_threads();

// Bytes of memory that this process may use: those of the machine, or fewer by the limits of its cgroup and the parents,
// v1 or v2, and of its address space. `root` as above.
uint64_t memory_limit(const std::string& root);

}  // namespace qdeploy
