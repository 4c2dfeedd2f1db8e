#include "nccl_lane.h"

namespace smp {
namespace {

// Places in a communicator of two.
constexpr int kSender = 0;
constexpr int kReceiver = 1;

}  // namespace

Status NcclLane::Connect(const std::string& id) {
  return Meet(id, 2, way_ == Way::kSend ? kSender : kReceiver);
}

Status NcclLane::Put(const Item& item) {
  const Buffer& buffer = item.buffer;
  if (way_ == Way::kSend) {
    return Check(nccl_->Send(buffer.data, buffer.bytes, kNcclInt8, kReceiver, comm_,
                             stream_),
                 "ncclSend");
  }
  return Check(
      nccl_->Recv(buffer.data, buffer.bytes, kNcclInt8, kSender, comm_, stream_),
      "ncclRecv");
}

}  // namespace smp
