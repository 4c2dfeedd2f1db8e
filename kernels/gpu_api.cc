// The part of the C interface that is about GPUs; see c_api.cc for its rules.
#include <cstdio>
#include <string>

#include "c_api.h"
#include "gpu_libraries.h"
#include "job.h"

namespace smp {
namespace {

std::string Row(std::initializer_list<std::string> cells) {
  std::string row;
  for (const std::string& cell : cells) {
    if (!row.empty()) row += '\t';
    for (const char c : cell) row += c == '\t' || c == '\n' ? ' ' : c;
  }
  return row + "\n";
}

std::string Uuid(const CudaUuid& uuid) {
  std::string text = "GPU-";
  for (int i = 0; i < 16; ++i) {
    char byte[4];
    std::snprintf(byte, sizeof byte, "%02x",
                  static_cast<unsigned>(static_cast<unsigned char>(uuid.bytes[i])));
    if (i == 4 || i == 6 || i == 8 || i == 10) text += '-';
    text += byte;
  }
  return text;
}

std::string GpuRow(const Cuda& cuda, int ordinal) {
  CudaDevice device = 0;
  char name[128] = "", bus[32] = "";
  CudaUuid uuid = {};
  size_t bytes = 0;
  if (cuda.DeviceGet(&device, ordinal) != kCudaSuccess) return "";
  cuda.DeviceGetName(name, sizeof name, device);
  cuda.DeviceGetPCIBusId(bus, sizeof bus, device);
  cuda.DeviceGetUuid(&uuid, device);
  cuda.DeviceTotalMem(&bytes, device);
  return Row({"gpu", std::to_string(ordinal), name, Uuid(uuid), bus,
              std::to_string(bytes)});
}

}  // namespace
}  // namespace smp

// What there is for GPUs, in rows of cells with tabs between them:
//   cuda  version  path  why it cannot be used, or nothing
//   nccl  version  path  why not
//   gpu   ordinal  name  uuid  PCI bus  bytes         (each that is visible)
// Needs no job. Returns the length of the whole text, which may be above `capacity`.
SMP_API int smp_gpu_info(char* out, size_t capacity) {
  const smp::Cuda& cuda = smp::GetCuda();
  const smp::Nccl& nccl = smp::GetNccl();
  int version = 0, count = 0;
  if (cuda.DriverGetVersion != nullptr) cuda.DriverGetVersion(&version);
  std::string text =
      smp::Row({"cuda", std::to_string(version), cuda.path, cuda.why_not}) +
      smp::Row({"nccl", std::to_string(nccl.version), nccl.path, nccl.why_not});
  if (cuda.usable()) cuda.DeviceGetCount(&count);
  for (int i = 0; i < count; ++i) text += smp::GpuRow(cuda, i);
  smp::CopyText(text, out, capacity);
  return static_cast<int>(text.size());
}

// Lets this rank send and receive in the memory of a GPU, the `ordinal`-th visible one.
// Once, after smp_start.
SMP_API int smp_gpu_open(int ordinal) {
  const auto job = smp::CurrentJob();
  return job ? smp::Result(job->OpenGpu(ordinal)) : smp::Fail(smp::kNotOpen);
}

// Writes the id that both ends of a connection need; returns its length in bytes.
SMP_API int smp_nccl_id(void* id, size_t capacity) {
  const smp::Nccl& nccl = smp::GetNccl();
  if (!nccl.usable()) return smp::Fail("no NCCL: " + nccl.why_not);
  std::string made;
  const smp::Status status = smp::NcclTransport::MakeId(nccl, &made);
  if (!status.ok()) return smp::Fail(status.text);
  if (made.size() > capacity) return smp::Fail("the buffer is too small for the id");
  made.copy(static_cast<char*>(id), made.size());
  return static_cast<int>(made.size());
}

// Connects this rank with `peer`, to send to it, or else to receive from it; returns
// when both are there, or after timeout_s. Ranks that make several connections must make
// them in an order that all of them agree on.
SMP_API int smp_nccl_connect(int peer, int sends, const void* id, size_t length) {
  const auto job = smp::CurrentJob();
  if (!job) return smp::Fail(smp::kNotOpen);
  if (peer < 0 || peer >= job->options().size || peer == job->options().rank) {
    return smp::Fail("peer must be another rank of the job; peer=" +
                     std::to_string(peer));
  }
  using Way = smp::NcclTransport::Way;
  return smp::Result(job->ConnectGpu(peer, sends != 0 ? Way::kSend : Way::kRecv,
                                     {static_cast<const char*>(id), length}));
}

// Connects the ranks of a group, of which this one is one, for sums; returns the number
// that SmpSumPost knows the group by. As smp_nccl_connect in all else.
SMP_API int smp_nccl_group(const int* ranks, int count, const void* id, size_t length) {
  const auto job = smp::CurrentJob();
  if (!job) return smp::Fail(smp::kNotOpen);
  int group = -1;
  const smp::Status status = job->ConnectGroup(
      {ranks, ranks + count}, {static_cast<const char*>(id), length}, &group);
  return status.ok() ? group : smp::Fail(status.text);
}
