// The plan as a table to read, the one that `qdeploy plan` prints.
#pragma once
#include <cstdint>
#include <string>

#include "../session.h"

namespace qdeploy {

// Of a call with `batch` images. Throws InputError for none, and for more than 64 bits can count the work of.
std::string plan_text(Session& session, int64_t batch);

}  // namespace qdeploy
