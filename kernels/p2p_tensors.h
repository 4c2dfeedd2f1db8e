// Tensors as messages: what the kernels of the ops share.
#ifndef SMP_TF_KERNELS_P2P_TENSORS_H_
#define SMP_TF_KERNELS_P2P_TENSORS_H_

#include <memory>
#include <string>

#include "job.h"
#include "tensorflow/core/framework/op_kernel.h"
#include "timeline.h"

namespace smp {

absl::Status ToAbsl(const Status& status);

// An error when no job is open.
absl::Status FindJob(std::shared_ptr<Job>* job);

// An error when this rank does not send from the memory of a GPU.
absl::Status FindGpu(std::shared_ptr<Job>* job, Job::Gpu** gpu);

// The stream of computations of the device that a kernel runs on.
void* StreamOf(tensorflow::OpKernelContext* context);

// Travels ahead of a tensor whose size in bytes is not known to both ends.
struct Header {
  static constexpr int kMaxDims = 16;
  int32_t dtype = 0;
  int32_t dims = 0;
  int64_t sizes[kMaxDims] = {};
  int64_t bytes = 0;  // of what follows
};

// The attributes that the ops share.
struct Attributes {
  RoutePtr route;
  tensorflow::DataType dtype = tensorflow::DT_INVALID;
  tensorflow::PartialTensorShape partial_shape;
  tensorflow::TensorShape shape;  // meaningful when is_static
  bool is_static = false;         // both ends know how many bytes it has
  bool more = false;  // another one for the same peer follows at once
  int program = -1;  // what the timeline calls it
  int event = -1;

  absl::Status Read(tensorflow::OpKernelConstruction* context);

  Timeline::Start Begin() const { return GetTimeline().Begin(program, event); }

  // What arrives first.
  Part first_part() const { return is_static ? Part::kPayload : Part::kHeader; }
};

// A kernel, of whichever kind, that has them. Cheap, so that the executor runs it in
// place rather than behind the next segment.
template <typename Kernel>
class WithAttributes : public Kernel {
 public:
  explicit WithAttributes(tensorflow::OpKernelConstruction* context) : Kernel(context) {
    OP_REQUIRES_OK(context, attributes_.Read(context));
  }

  bool IsExpensive() override { return false; }

 protected:
  Attributes attributes_;
};

// An error when the tensor is not what both ends have agreed on.
absl::Status CheckShape(const Attributes& attributes, const tensorflow::Tensor& tensor);

// What goes ahead of the tensor; `bytes`: of its payload.
std::shared_ptr<Header> HeaderOf(const tensorflow::Tensor& tensor, size_t bytes);

// What travels: the tensor's own bytes, or those that strings are written as.
Buffer PayloadOf(const tensorflow::Tensor& tensor);

// Room for a payload that a header has announced; TakeTensor makes a tensor of it when
// it is there.
absl::Status MakeRoom(tensorflow::OpKernelContext* context,
                      const Attributes& attributes, const Header& header,
                      const tensorflow::TensorShape& shape, Buffer* buffer);
absl::Status TakeTensor(tensorflow::DataType dtype, const std::shared_ptr<void>& owner,
                        tensorflow::Tensor* tensor);

// The shape that a header announces; an error when that was not agreed on. `what` is
// the message, for the error.
absl::Status ShapeOf(const Attributes& attributes, const Header& header,
                     const std::string& what, tensorflow::TensorShape* shape);

Buffer BufferOf(const tensorflow::Tensor& tensor);
Buffer BufferOf(const std::shared_ptr<Header>& header);

// Room for what arrives first; the buffer's owner is a Tensor or a Header.
absl::Status Allocate(tensorflow::OpKernelContext* context,
                      const Attributes& attributes, Buffer* buffer);

}  // namespace smp

#endif  // SMP_TF_KERNELS_P2P_TENSORS_H_
