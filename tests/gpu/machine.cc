#include "machine.h"

#include <dlfcn.h>

#include <algorithm>
#include <chrono>
#include <cstring>

namespace smp::testing {
namespace {

// A queue of CUDA takes about a thousand calls before it keeps the caller.
constexpr int kMostFills = 900;

template <typename Function>
void Find(const std::string& library, const char* name, Function* function) {
  void* const handle = dlopen(library.c_str(), RTLD_NOW | RTLD_LOCAL);
  *function =
      handle == nullptr ? nullptr : reinterpret_cast<Function>(dlsym(handle, name));
  if (*function == nullptr) {
    std::cerr << library << " has no " << name << "\n";
    std::_Exit(1);
  }
}

}  // namespace

Machine Machine::FromArguments(int count, char** arguments) {
  Machine machine;
  for (int i = 1; i < count; ++i) {
    const std::string name = arguments[i];
    if (name == "--small") {
      machine.small = true;
    } else if (name == "--cuda" && i + 1 < count) {
      machine.cuda_file = arguments[++i];
    } else if (name == "--nccl" && i + 1 < count) {
      machine.nccl_file = arguments[++i];
    } else {
      std::cerr << "usage: " << arguments[0]
                << " [--cuda FILE] [--nccl FILE] [--small]\n";
      std::exit(2);
    }
  }
  return machine;
}

std::string Pattern(size_t bytes, int seed) {
  std::string text(bytes, '\0');
  for (size_t i = 0; i < bytes; ++i) text[i] = static_cast<char>(seed + i + (i >> 8));
  return text;
}

Done Ending::Handler() {
  return [state = state_](const Status& status) {
    std::lock_guard<std::mutex> lock(state->mutex);
    CHECK(!state->over);
    state->over = true;
    state->status = status;
    state->changed.notify_all();
  };
}

bool Ending::IsOver() const {
  std::lock_guard<std::mutex> lock(state_->mutex);
  return state_->over;
}

Status Ending::Await() const {
  std::unique_lock<std::mutex> lock(state_->mutex);
  CHECK(state_->changed.wait_for(lock, std::chrono::seconds(30),
                                 [this] { return state_->over; }));
  return state_->status;
}

GpuSide::GpuSide(Process& process, const Machine& machine)
    : process_(process),
      machine_(machine),
      cuda_(LoadCuda(machine.cuda_file.c_str())),
      nccl_(LoadNccl(machine.nccl_file.c_str())),
      device_(std::make_shared<GpuDevice>(&cuda_)) {
  CHECK_EQ(cuda_.why_not, "");
  CHECK_EQ(nccl_.why_not, "");
  Find(machine.cuda_file, "cuCtxSynchronize", &more_.CtxSynchronize);
  Find(machine.cuda_file, "cuStreamSynchronize", &more_.StreamSynchronize);
  Find(machine.cuda_file, "cuMemcpyHtoD_v2", &more_.MemcpyHtoD);
  Find(machine.cuda_file, "cuMemcpyDtoH_v2", &more_.MemcpyDtoH);
  Find(machine.cuda_file, "cuMemcpyDtoDAsync_v2", &more_.MemcpyDtoDAsync);
  Find(machine.cuda_file, "cuMemsetD8Async", &more_.MemsetD8Async);
  int gpus = 0;
  Check(cuda_.DeviceGetCount(&gpus), "cuDeviceGetCount");
  CHECK_EQ(device_->Open(process.rank % gpus).text, "");
  CHECK_EQ(device_->MakeStream(&stream_).text, "");
  const auto failed = [](const std::string& why) {
    std::cerr << "a connection failed: " << why << "\n";
  };
  transport_ = std::make_unique<NcclTransport>(process.size, device_, &nccl_, failed);
  for (const int sender : {0, 1}) {
    std::string id;
    if (process.rank == sender) CHECK_EQ(NcclTransport::MakeId(nccl_, &id).text, "");
    const auto ids = process.Exchange(id);
    const Way way = process.rank == sender ? Way::kSend : Way::kRecv;
    if (way == Way::kRecv) id = ids[sender];
    CHECK_EQ(transport_->Connect(peer(), way, id, 50).text, "");
  }
}

GpuSide::~GpuSide() {
  Synchronize();
  transport_->Close(10);
  transport_.reset();
  scratch_ = {};
  device_->FreeStream(stream_);
}

void GpuSide::Check(CudaResult result, const char* what) const {
  CHECK_EQ(device_->Check(result, what).text, "");
}

Buffer GpuSide::Allocate(size_t bytes) {
  const GpuDevice::Current current(*device_);
  CudaAddress address = 0;
  Check(cuda_.MemAlloc(&address, std::max<size_t>(bytes, 1)), "cuMemAlloc");
  void* const data = reinterpret_cast<void*>(address);
  return {data, bytes, std::shared_ptr<void>(data, [this, address](void*) {
            const GpuDevice::Current current(*device_);
            cuda_.MemFree(address);
          })};
}

void GpuSide::Write(const Buffer& to, const std::string& text) {
  const GpuDevice::Current current(*device_);
  if (text.empty()) return;
  Check(more_.MemcpyHtoD(reinterpret_cast<CudaAddress>(to.data), text.data(),
                         text.size()),
        "cuMemcpyHtoD");
  // It returns when the text is copied, and the device may not have all of it yet:
  // other streams than the default one do not wait for that.
  Check(more_.CtxSynchronize(), "cuCtxSynchronize");
}

std::string GpuSide::Read(const Buffer& from) {
  const GpuDevice::Current current(*device_);
  std::string text(from.bytes, '\0');
  if (text.empty()) return text;
  Check(more_.MemcpyDtoH(text.data(), reinterpret_cast<CudaAddress>(from.data),
                         text.size()),
        "cuMemcpyDtoH");
  return text;
}

Ending GpuSide::Send(const Buffer& buffer, bool more, uint64_t* id) {
  Message message;
  message.id = NextId();
  message.peer = peer();
  message.buffer = buffer;
  message.stream = stream_;
  message.more = more;
  if (id != nullptr) *id = message.id;
  Ending ending;
  transport_->Send(std::move(message), ending.Handler());
  return ending;
}

Ending GpuSide::Recv(const Buffer& buffer, bool more, uint64_t* id) {
  Message message;
  message.id = NextId();
  message.peer = peer();
  message.buffer = buffer;
  message.stream = stream_;
  message.more = more;
  if (id != nullptr) *id = message.id;
  Ending ending;
  transport_->Recv(std::move(message), ending.Handler());
  return ending;
}

void GpuSide::Join(uint64_t id) {
  Ending told;
  transport_->Join(id, stream_, told.Handler());
  CHECK_EQ(told.Await().text, "");
}

void GpuSide::Synchronize() {
  const GpuDevice::Current current(*device_);
  Check(more_.StreamSynchronize(stream_), "cuStreamSynchronize");
}

void GpuSide::Compute(double seconds) {
  const auto fill = [this](int times) {
    const GpuDevice::Current current(*device_);
    const auto address = reinterpret_cast<CudaAddress>(scratch_.data);
    for (int i = 0; i < times; ++i) {
      Check(more_.MemsetD8Async(address, static_cast<unsigned char>(i), scratch_.bytes,
                                stream_),
            "cuMemsetD8Async");
    }
  };
  if (scratch_.data == nullptr) {
    scratch_ = Allocate(size_t{machine_.small ? 16u : 512u} << 20);
    fill(2);
    Synchronize();
    const double start = Now();
    fill(10);
    Synchronize();
    fills_per_second_ = static_cast<int>(10 / (Now() - start));
  }
  fill(std::clamp(static_cast<int>(fills_per_second_ * seconds), 1, kMostFills));
}

NcclId GpuSide::ShareId() {
  NcclId id = {};
  if (process_.rank == 0) CHECK_EQ(nccl_.GetUniqueId(&id), kNcclSuccess);
  const auto ids = process_.Exchange(std::string(id.bytes, sizeof id.bytes));
  if (process_.rank == 1) std::memcpy(id.bytes, ids[0].data(), sizeof id.bytes);
  return id;
}

}  // namespace smp::testing
