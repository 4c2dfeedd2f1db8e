#include "control.h"

#include <cstring>

namespace smp {
namespace {

constexpr uint32_t kMagic = 0x31706d73;  // "smp1": raise the digit with the layout

struct Wire {
  uint32_t magic;
  uint32_t word;
  int32_t source;
  int32_t culprit;
  char job_id[kMaxJobId + 1];  // ends in zero
};

}  // namespace

std::string Encode(const Control& control) {
  Wire wire;
  std::memset(&wire, 0, sizeof wire);
  wire.magic = kMagic;
  wire.word = static_cast<uint32_t>(control.word);
  wire.source = control.source;
  wire.culprit = control.culprit;
  control.job_id.copy(wire.job_id, kMaxJobId);
  std::string bytes(reinterpret_cast<const char*>(&wire), sizeof wire);
  return bytes.append(control.text, 0, kMaxControlText);
}

bool Decode(const void* data, size_t bytes, Control* control) {
  Wire wire;
  if (bytes < sizeof wire || bytes > sizeof wire + kMaxControlText) return false;
  std::memcpy(&wire, data, sizeof wire);
  if (wire.magic != kMagic || wire.word < static_cast<uint32_t>(Word::kHello) ||
      wire.word > static_cast<uint32_t>(Word::kAlive) ||
      wire.job_id[kMaxJobId] != '\0') {
    return false;
  }
  control->word = static_cast<Word>(wire.word);
  control->source = wire.source;
  control->culprit = wire.culprit;
  control->job_id = wire.job_id;
  control->text.assign(static_cast<const char*>(data) + sizeof wire,
                       bytes - sizeof wire);
  return true;
}

}  // namespace smp
