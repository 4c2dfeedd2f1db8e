// Tensors as messages: what the kernels of the ops share.
#ifndef SMP_TF_KERNELS_P2P_TENSORS_H_
#define SMP_TF_KERNELS_P2P_TENSORS_H_

#include <memory>

#include "job.h"
#include "tensorflow/core/framework/op_kernel.h"
#include "timeline.h"

namespace smp {

absl::Status ToAbsl(const Status& status);

// An error when no job is open.
absl::Status FindJob(std::shared_ptr<Job>* job);

// Travels ahead of a tensor whose shape is not known to both ends.
struct Header {
  static constexpr int kMaxDims = 16;
  int32_t dtype = 0;
  int32_t dims = 0;
  int64_t sizes[kMaxDims] = {};
};

// The attributes that the ops share.
struct Attributes {
  RoutePtr route;
  tensorflow::DataType dtype = tensorflow::DT_INVALID;
  tensorflow::PartialTensorShape partial_shape;
  tensorflow::TensorShape shape;  // meaningful when is_static
  bool is_static = false;
  int program = -1;  // what the timeline calls it
  int event = -1;

  absl::Status Read(tensorflow::OpKernelConstruction* context);

  Timeline::Start Begin() const { return GetTimeline().Begin(program, event); }

  // What arrives first.
  Part first_part() const { return is_static ? Part::kPayload : Part::kHeader; }
};

Buffer BufferOf(const tensorflow::Tensor& tensor);
Buffer BufferOf(const std::shared_ptr<Header>& header);

// Room for what arrives first; the buffer's owner is a Tensor or a Header.
absl::Status Allocate(tensorflow::OpKernelContext* context,
                      const Attributes& attributes, Buffer* buffer);

}  // namespace smp

#endif  // SMP_TF_KERNELS_P2P_TENSORS_H_
