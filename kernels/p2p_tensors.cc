#include "p2p_tensors.h"

#include <string>
#include <utility>

namespace smp {

absl::Status ToAbsl(const Status& status) {
  const std::string text = "smp_tf: " + status.text;
  switch (status.code) {
    case Code::kOk:
      return absl::OkStatus();
    case Code::kUnavailable:
      return absl::UnavailableError(text);
    case Code::kCancelled:
      return absl::CancelledError(text);
    case Code::kDeadline:
      return absl::DeadlineExceededError(text);
    case Code::kDataLoss:
      return absl::DataLossError(text);
    case Code::kInvalid:
      return absl::InvalidArgumentError(text);
    case Code::kNotConnected:
      return absl::FailedPreconditionError(text);
  }
  return absl::InternalError(text);
}

absl::Status FindJob(std::shared_ptr<Job>* job) {
  *job = CurrentJob();
  if (*job) return absl::OkStatus();
  return absl::FailedPreconditionError(
      "smp_tf: no job is open on this rank; call smp_tf.init() before the step");
}

absl::Status Attributes::Read(tensorflow::OpKernelConstruction* context) {
  auto read = std::make_shared<Route>();
  int64_t channel = 0;
  TF_RETURN_IF_ERROR(context->GetAttr("peer", &read->peer));
  TF_RETURN_IF_ERROR(context->GetAttr("channel", &channel));
  TF_RETURN_IF_ERROR(context->GetAttr("label", &read->label));
  TF_RETURN_IF_ERROR(context->GetAttr("shape", &partial_shape));
  TF_RETURN_IF_ERROR(context->GetAttr("T", &dtype));
  TF_RETURN_IF_ERROR(context->GetAttr("program", &program));
  TF_RETURN_IF_ERROR(context->GetAttr("event", &event));
  if (channel > kMaxChannel) {
    return absl::InvalidArgumentError("smp_tf: channel must fit 28 bits; channel=" +
                                      std::to_string(channel));
  }
  if (!tensorflow::DataTypeCanUseMemcpy(dtype)) {
    return absl::InvalidArgumentError(
        "smp_tf: only tensors of plain bytes can be sent; "
        "dtype=" +
        tensorflow::DataTypeString(dtype) + " label=" + read->label);
  }
  read->channel = static_cast<uint32_t>(channel);
  route = std::move(read);
  is_static = partial_shape.AsTensorShape(&shape);
  return absl::OkStatus();
}

Buffer BufferOf(const tensorflow::Tensor& tensor) {
  auto owner = std::make_shared<tensorflow::Tensor>(tensor);
  const auto bytes = owner->tensor_data();
  return {const_cast<char*>(bytes.data()), bytes.size(), owner};
}

Buffer BufferOf(const std::shared_ptr<Header>& header) {
  return {header.get(), sizeof(Header), header};
}

absl::Status Allocate(tensorflow::OpKernelContext* context,
                      const Attributes& attributes, Buffer* buffer) {
  if (!attributes.is_static) {
    *buffer = BufferOf(std::make_shared<Header>());
    return absl::OkStatus();
  }
  tensorflow::Tensor tensor;
  TF_RETURN_IF_ERROR(
      context->allocate_temp(attributes.dtype, attributes.shape, &tensor));
  *buffer = BufferOf(tensor);
  return absl::OkStatus();
}

}  // namespace smp
