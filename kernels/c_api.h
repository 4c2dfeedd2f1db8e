// What the files of the C interface share.
#ifndef SMP_TF_KERNELS_C_API_H_
#define SMP_TF_KERNELS_C_API_H_

#include <cstddef>
#include <string>

#include "transport.h"

#define SMP_API extern "C" __attribute__((visibility("default")))

namespace smp {

constexpr char kNotOpen[] = "no job is open on this rank; call smp_tf.init() first";

// -1, and the text for smp_last_error.
int Fail(const std::string& text);

// 0, or the failure.
int Result(const Status& status);

// Writes as much as there is room for, and returns how much that is.
int CopyText(const std::string& text, char* out, size_t capacity);

}  // namespace smp

#endif  // SMP_TF_KERNELS_C_API_H_
