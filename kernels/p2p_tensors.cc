#include "p2p_tensors.h"

#include <algorithm>
#include <cstring>
#include <string>
#include <utility>

#include "xla/stream_executor/stream.h"

namespace smp {
namespace {

// Strings as they travel: the lengths of all, 8 bytes each, then their characters.
struct Strings {
  tensorflow::TensorShape shape;
  std::string bytes;
};

absl::Status NotTheStrings(int64_t bytes, const tensorflow::TensorShape& shape) {
  return absl::DataLossError(
      "smp_tf: what arrived is no tensor of strings; bytes=" + std::to_string(bytes) +
      " shape=" + shape.DebugString());
}

}  // namespace

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

absl::Status FindGpu(std::shared_ptr<Job>* job, Job::Gpu** gpu) {
  TF_RETURN_IF_ERROR(FindJob(job));
  *gpu = (*job)->gpu();
  if (*gpu != nullptr) return absl::OkStatus();
  return absl::FailedPreconditionError(
      "smp_tf: this rank does not send from the memory of its GPU; call smp_tf.init() "
      "before the step");
}

void* StreamOf(tensorflow::OpKernelContext* context) {
  return context->op_device_context()->stream()->platform_specific_handle().stream;
}

absl::Status Attributes::Read(tensorflow::OpKernelConstruction* context) {
  auto read = std::make_shared<Route>();
  int64_t channel = 0;
  TF_RETURN_IF_ERROR(context->GetAttr("peer", &read->peer));
  TF_RETURN_IF_ERROR(context->GetAttr("channel", &channel));
  TF_RETURN_IF_ERROR(context->GetAttr("label", &read->label));
  TF_RETURN_IF_ERROR(context->GetAttr("shape", &partial_shape));
  TF_RETURN_IF_ERROR(context->GetAttr("T", &dtype));
  TF_RETURN_IF_ERROR(context->GetAttr("more", &more));
  TF_RETURN_IF_ERROR(context->GetAttr("program", &program));
  TF_RETURN_IF_ERROR(context->GetAttr("event", &event));
  if (channel > kMaxChannel) {
    return absl::InvalidArgumentError("smp_tf: channel must fit 28 bits; channel=" +
                                      std::to_string(channel));
  }
  if (!tensorflow::DataTypeCanUseMemcpy(dtype) && dtype != tensorflow::DT_STRING) {
    return absl::InvalidArgumentError(
        "smp_tf: only tensors of plain bytes and strings can be sent; "
        "dtype=" +
        tensorflow::DataTypeString(dtype) + " label=" + read->label);
  }
  read->channel = static_cast<uint32_t>(channel);
  route = std::move(read);
  is_static = partial_shape.AsTensorShape(&shape) && dtype != tensorflow::DT_STRING;
  return absl::OkStatus();
}

absl::Status CheckShape(const Attributes& attributes,
                        const tensorflow::Tensor& tensor) {
  if (attributes.partial_shape.IsCompatibleWith(tensor.shape()) &&
      tensor.dims() <= Header::kMaxDims) {
    return absl::OkStatus();
  }
  return absl::InvalidArgumentError(
      "smp_tf: the tensor has not the shape that both ends agreed on; shape=" +
      tensor.shape().DebugString() +
      " agreed=" + attributes.partial_shape.DebugString() + ": " +
      attributes.route->label + " to rank " + std::to_string(attributes.route->peer));
}

std::shared_ptr<Header> HeaderOf(const tensorflow::Tensor& tensor, size_t bytes) {
  auto header = std::make_shared<Header>();
  header->dtype = tensor.dtype();
  header->dims = tensor.dims();
  for (int i = 0; i < tensor.dims(); ++i) header->sizes[i] = tensor.dim_size(i);
  header->bytes = static_cast<int64_t>(bytes);
  return header;
}

Buffer PayloadOf(const tensorflow::Tensor& tensor) {
  if (tensor.dtype() != tensorflow::DT_STRING) return BufferOf(tensor);
  const auto strings = tensor.flat<tensorflow::tstring>();
  auto written = std::make_shared<Strings>();
  for (int64_t i = 0; i < strings.size(); ++i) {
    const uint64_t length = strings(i).size();
    written->bytes.append(reinterpret_cast<const char*>(&length), sizeof length);
  }
  for (int64_t i = 0; i < strings.size(); ++i) {
    written->bytes.append(strings(i).data(), strings(i).size());
  }
  return {written->bytes.data(), written->bytes.size(), written};
}

absl::Status MakeRoom(tensorflow::OpKernelContext* context,
                      const Attributes& attributes, const Header& header,
                      const tensorflow::TensorShape& shape, Buffer* buffer) {
  if (attributes.dtype == tensorflow::DT_STRING) {
    if (header.bytes < 0) return NotTheStrings(header.bytes, shape);
    auto room = std::make_shared<Strings>();
    room->shape = shape;
    room->bytes.resize(static_cast<size_t>(header.bytes));
    *buffer = {room->bytes.data(), room->bytes.size(), room};
    return absl::OkStatus();
  }
  tensorflow::Tensor tensor;
  TF_RETURN_IF_ERROR(context->allocate_temp(attributes.dtype, shape, &tensor));
  *buffer = BufferOf(tensor);
  return absl::OkStatus();
}

absl::Status TakeTensor(tensorflow::DataType dtype, const std::shared_ptr<void>& owner,
                        tensorflow::Tensor* tensor) {
  if (dtype != tensorflow::DT_STRING) {
    *tensor = *std::static_pointer_cast<tensorflow::Tensor>(owner);
    return absl::OkStatus();
  }
  const Strings& arrived = *std::static_pointer_cast<Strings>(owner);
  *tensor = tensorflow::Tensor(dtype, arrived.shape);
  auto strings = tensor->flat<tensorflow::tstring>();
  const size_t count = static_cast<size_t>(strings.size());
  const auto wrong = [&] { return NotTheStrings(arrived.bytes.size(), arrived.shape); };
  if (arrived.bytes.size() / sizeof(uint64_t) < count) return wrong();
  size_t place = count * sizeof(uint64_t);
  for (size_t i = 0; i < count; ++i) {
    uint64_t length;
    std::memcpy(&length, arrived.bytes.data() + i * sizeof length, sizeof length);
    if (length > arrived.bytes.size() - place) return wrong();
    strings(i).assign(arrived.bytes.data() + place, length);
    place += length;
  }
  return place == arrived.bytes.size() ? absl::OkStatus() : wrong();
}

absl::Status ShapeOf(const Attributes& attributes, const Header& header,
                     const std::string& what, tensorflow::TensorShape* shape) {
  const int dims = std::min<int>(header.dims, Header::kMaxDims);
  TF_RETURN_IF_ERROR(tensorflow::TensorShape::BuildTensorShape(
      absl::MakeConstSpan(header.sizes, std::max(dims, 0)), shape));
  if (header.dtype == attributes.dtype &&
      attributes.partial_shape.IsCompatibleWith(*shape)) {
    return absl::OkStatus();
  }
  return ToAbsl(
      {Code::kDataLoss,
       "the two ends disagree about a tensor; sent=" +
           tensorflow::DataTypeString(static_cast<tensorflow::DataType>(header.dtype)) +
           shape->DebugString() +
           " expected=" + tensorflow::DataTypeString(attributes.dtype) +
           attributes.partial_shape.DebugString() + ": " + what});
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
