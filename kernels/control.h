// The words that ranks exchange about the job itself.
#ifndef SMP_TF_KERNELS_CONTROL_H_
#define SMP_TF_KERNELS_CONTROL_H_

#include <cstddef>
#include <cstdint>
#include <string>

namespace smp {

enum class Word : uint32_t {
  kHello = 1,    // the handshake, on both endpoints
  kRefused = 2,  // answer to a hello of another job
  kFailed = 3,   // `culprit` failed first; `text` says how
  kLeaving = 4,  // monitor endpoint: a closed connection is no death from here on
  kLast = 5,     // data endpoint: everything that was sent has arrived
  kAlive = 6,    // monitor endpoint: nothing, but the other host must acknowledge it
};

struct Control {
  Word word = Word::kHello;
  int source = -1;   // who says so
  int culprit = -1;  // kFailed: who failed first
  std::string job_id;
  std::string text;
};

constexpr size_t kMaxJobId = 63;
constexpr size_t kMaxControlText =
    2000;  // longer texts are cut; fits one eager message

std::string Encode(const Control& control);

// False for anything that Encode has not made.
bool Decode(const void* data, size_t bytes, Control* control);

}  // namespace smp

#endif  // SMP_TF_KERNELS_CONTROL_H_
