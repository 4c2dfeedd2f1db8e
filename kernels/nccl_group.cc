#include "nccl_group.h"

namespace smp {

size_t NcclGroup::SizeOf(int type) {
  switch (type) {
    case kNcclInt8:
    case kNcclUint8:
      return 1;
    case kNcclFloat16:
    case kNcclBfloat16:
      return 2;
    case kNcclInt32:
    case kNcclUint32:
    case kNcclFloat32:
      return 4;
    case kNcclInt64:
    case kNcclUint64:
    case kNcclFloat64:
      return 8;
    default:
      return 0;
  }
}

Status NcclGroup::Put(const Item& item) {
  const size_t size = SizeOf(item.sum.type);
  if (size == 0 || item.buffer.bytes % size != 0) {
    return {Code::kInvalid,
            "no whole number of elements: bytes=" + std::to_string(item.buffer.bytes) +
                " type=" + std::to_string(item.sum.type)};
  }
  return Check(nccl_->AllReduce(item.buffer.data, item.sum.result,
                                item.buffer.bytes / size,
                                static_cast<NcclType>(item.sum.type), kNcclSum, comm_,
                                stream_),
               "ncclAllReduce");
}

}  // namespace smp
