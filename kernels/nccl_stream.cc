#include "nccl_stream.h"

#include <chrono>
#include <cstring>
#include <thread>

namespace smp {
namespace {

constexpr auto kPause = std::chrono::microseconds(100);
constexpr size_t kTryBytes = 4;  // a number for an allreduce, too

}  // namespace

NcclStream::~NcclStream() {
  Abort();
  if (stream_ != nullptr) device_->FreeStream(stream_);
  if (first_ == 0) return;
  const GpuDevice::Current current(*device_);
  device_->cuda().MemFree(first_);
}

Status NcclStream::Check(NcclResult result, const char* what) const {
  if (result == kNcclSuccess) return {};
  return {Code::kUnavailable, std::string(what) + ": " + nccl_->Text(result, comm_)};
}

Status NcclStream::Settle(NcclResult result, const char* what) {
  while (result == kNcclInProgress) {
    std::this_thread::sleep_for(kPause);
    std::lock_guard<std::mutex> lock(ending_);
    if (ended_) return {Code::kUnavailable, std::string(what) + ": it was given up"};
    const NcclResult asked = nccl_->CommGetAsyncError(comm_, &result);
    if (asked != kNcclSuccess) result = asked;
  }
  return Check(result, what);
}

Status NcclStream::Meet(const std::string& id, int size, int place) {
  NcclId nccl_id;
  if (id.size() != sizeof nccl_id.bytes) {
    return {Code::kInvalid, "an id of NCCL has " + std::to_string(sizeof nccl_id) +
                                " bytes; bytes=" + std::to_string(id.size())};
  }
  std::memcpy(nccl_id.bytes, id.data(), id.size());
  const GpuDevice::Current current(*device_);
  Status status =
      Settle(nccl_->CommInitRank(&comm_, size, nccl_id, place), "ncclCommInitRank");
  if (status.ok()) status = device_->MakeStream(&stream_);
  if (status.ok()) {
    status = device_->Check(device_->cuda().MemAlloc(&first_, kTryBytes), "cuMemAlloc");
  }
  GpuEvent after;
  if (status.ok()) {
    void* const data = reinterpret_cast<void*>(first_);
    status = Launch({{{data, kTryBytes, nullptr}, nullptr, {data, kNcclInt8}}}, &after);
  }
  while (status.ok() && !device_->IsOver(after, &status)) {
    std::this_thread::sleep_for(kPause);
  }
  // The memory stays: cuMemFree would wait for what is on the other streams.
  return status;
}

Status NcclStream::Launch(const std::vector<Item>& items, GpuEvent* after) {
  const GpuDevice::Current current(*device_);
  for (const Item& item : items) {
    const Status status = device_->Wait(stream_, item.before);
    if (!status.ok()) return status;
  }
  Status status = Check(nccl_->GroupStart(), "ncclGroupStart");
  if (!status.ok()) return status;
  for (const Item& item : items) {
    // All of them know that there is nothing to move.
    if (item.buffer.bytes > 0) status = Put(item);
    if (!status.ok()) break;
  }
  const Status ended = Settle(nccl_->GroupEnd(), "ncclGroupEnd");
  if (status.ok()) status = ended;
  if (!status.ok()) return status;
  return device_->Record(stream_, after);
}

Status NcclStream::AsyncError() {
  std::lock_guard<std::mutex> lock(ending_);
  if (ended_ || comm_ == nullptr) return {};
  NcclResult error = kNcclSuccess;
  const NcclResult asked = nccl_->CommGetAsyncError(comm_, &error);
  if (asked == kNcclSuccess && error == kNcclInProgress) return {};
  return Check(asked != kNcclSuccess ? asked : error, "a connection of NCCL failed");
}

void NcclStream::Abort() {
  std::lock_guard<std::mutex> lock(ending_);
  if (ended_ || comm_ == nullptr) return;
  ended_ = true;
  const GpuDevice::Current current(*device_);
  nccl_->CommAbort(comm_);
  has_ended_ = true;
}

}  // namespace smp
