// Two accelerators that are none: memory of this machine, and a thread for each stream that does what was enqueued, in
// order. Copies from a device to pinned memory can be held up, and torn apart, by whoever tests what depends on them.
// Everything that isn't a copy is computed by torch on the CPU, once the current stream is empty: so a step that ought
// to have waited for a copy, and didn't, overwrites what is being copied.

#include <ATen/EmptyTensor.h>
#include <ATen/core/CachingHostAllocator.h>
#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <ATen/native/CPUFallback.h>
#include <ATen/ops/_copy_from.h>
#include <ATen/ops/_local_scalar_dense.h>
#include <ATen/ops/_reshape_alias_native.h>
#include <ATen/ops/as_strided_native.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/resize_native.h>
#include <ATen/ops/set_native.h>
#include <ATen/ops/view_native.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/csrc/utils/pybind.h>
#include <torch/library.h>

#include <condition_variable>
#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

namespace {

constexpr auto KIND = c10::DeviceType::PrivateUse1;
constexpr int DEVICES = 2;
constexpr size_t PIECE = 64 << 10;  // bytes of a copy between two looks at the gate

// ---- the gate: what the tests turn ---------------------------------------------------------------------------------

struct Gate {
  std::mutex mutex;
  std::condition_variable changed;
  bool held = false;
  size_t least = 0;     // bytes of a copy that is held
  int delay = 0;        // microseconds before each piece
  int waiting = 0;      // copies that stand before it
  long copied = 0;      // bytes that went from a device to pinned memory without the host waiting
  long blocking = 0;    // bytes that went from a device to the host while the host waited
  long syncs = 0;       // how often the host waited for a stream or a device
  long pinned = 0;      // bytes that are pinned
  long limit = -1;      // bytes that may be; negative: as many as wanted

  void pass(size_t count) {
    std::unique_lock<std::mutex> lock(mutex);
    ++waiting;
    changed.notify_all();
    changed.wait(lock, [this, count] { return !held || count < least; });
    --waiting;
    int pause = delay;
    lock.unlock();
    if (pause > 0) std::this_thread::sleep_for(std::chrono::microseconds(pause));
  }
};

Gate& gate() {
  static auto* one = new Gate();  // threads of streams outlive what is destroyed at the end of the process
  return *one;
}

// ---- streams and events --------------------------------------------------------------------------------------------

struct Flag {
  std::mutex mutex;
  std::condition_variable changed;
  bool set = false;
  void raise() {
    std::lock_guard<std::mutex> lock(mutex);
    set = true;
    changed.notify_all();
  }
  void wait() {
    std::unique_lock<std::mutex> lock(mutex);
    changed.wait(lock, [this] { return set; });
  }
  bool is() {
    std::lock_guard<std::mutex> lock(mutex);
    return set;
  }
};

struct Event {
  std::shared_ptr<Flag> flag;  // of the last time that it was recorded
};

class Queue {
 public:
  void add(std::function<void()> job) {
    std::lock_guard<std::mutex> lock(mutex_);
    if (!running_) {
      running_ = true;
      std::thread([this] { run(); }).detach();
    }
    jobs_.push_back(std::move(job));
    changed_.notify_all();
  }
  void drain() {
    std::unique_lock<std::mutex> lock(mutex_);
    changed_.wait(lock, [this] { return jobs_.empty() && !busy_; });
  }
  bool idle() {
    std::lock_guard<std::mutex> lock(mutex_);
    return jobs_.empty() && !busy_;
  }

 private:
  void run() {
    std::unique_lock<std::mutex> lock(mutex_);
    while (true) {
      changed_.wait(lock, [this] { return !jobs_.empty(); });
      auto job = std::move(jobs_.front());
      jobs_.pop_front();
      busy_ = true;
      lock.unlock();
      job();
      job = nullptr;
      lock.lock();
      busy_ = false;
      changed_.notify_all();
    }
  }
  std::mutex mutex_;
  std::condition_variable changed_;
  std::deque<std::function<void()>> jobs_;
  bool running_ = false, busy_ = false;
};

struct Streams {
  std::mutex mutex;
  std::vector<std::vector<Queue*>> of{DEVICES};
  Streams() {
    for (auto& one : of) one.push_back(new Queue());
  }
  Queue& at(c10::Stream stream) {
    std::lock_guard<std::mutex> lock(mutex);
    return *of[stream.device_index()][stream.id()];
  }
  c10::StreamId make(int device) {
    std::lock_guard<std::mutex> lock(mutex);
    of[device].push_back(new Queue());
    return static_cast<c10::StreamId>(of[device].size() - 1);
  }
};

Streams& streams() {
  static auto* one = new Streams();
  return *one;
}

thread_local c10::DeviceIndex current_device = 0;
thread_local c10::StreamId current_stream[DEVICES] = {};

c10::Stream on(c10::DeviceIndex device) {
  return c10::Stream(c10::Stream::UNSAFE, c10::Device(KIND, device), current_stream[device]);
}

void wait_for(Queue& queue) {
  {
    std::lock_guard<std::mutex> lock(gate().mutex);
    ++gate().syncs;
  }
  queue.drain();
}

struct Guard final : public c10::impl::DeviceGuardImplInterface {
  c10::DeviceType type() const override { return KIND; }
  c10::Device getDevice() const override { return c10::Device(KIND, current_device); }
  void setDevice(c10::Device device) const override { current_device = device.index(); }
  void uncheckedSetDevice(c10::Device device) const noexcept override { current_device = device.index(); }
  c10::Device exchangeDevice(c10::Device device) const override {
    auto before = getDevice();
    setDevice(device);
    return before;
  }
  c10::DeviceIndex deviceCount() const noexcept override { return DEVICES; }
  c10::Stream getStream(c10::Device device) const override {
    return on(device.has_index() ? device.index() : current_device);
  }
  c10::Stream getDefaultStream(c10::Device device) const override {
    return c10::Stream(c10::Stream::UNSAFE, c10::Device(KIND, device.has_index() ? device.index() : current_device), 0);
  }
  c10::Stream getNewStream(c10::Device device, int) const override {
    auto index = device.has_index() ? device.index() : current_device;
    return c10::Stream(c10::Stream::UNSAFE, c10::Device(KIND, index), streams().make(index));
  }
  c10::Stream getStreamFromGlobalPool(c10::Device device, bool) const override { return getNewStream(device, 0); }
  c10::Stream exchangeStream(c10::Stream stream) const override {
    auto before = on(stream.device_index());
    current_stream[stream.device_index()] = stream.id();
    return before;
  }
  void record(void** event, const c10::Stream& stream, const c10::DeviceIndex, const c10::EventFlag) const override {
    if (*event == nullptr) *event = new Event();
    auto flag = std::make_shared<Flag>();
    static_cast<Event*>(*event)->flag = flag;
    streams().at(stream).add([flag] { flag->raise(); });
  }
  void block(void* event, const c10::Stream& stream) const override {
    auto* one = static_cast<Event*>(event);
    if (one == nullptr || !one->flag) return;
    streams().at(stream).add([flag = one->flag] { flag->wait(); });
  }
  bool queryEvent(void* event) const override {
    auto* one = static_cast<Event*>(event);
    return one == nullptr || !one->flag || one->flag->is();
  }
  void synchronizeEvent(void* event) const override {
    auto* one = static_cast<Event*>(event);
    if (one != nullptr && one->flag) one->flag->wait();
  }
  void destroyEvent(void* event, const c10::DeviceIndex) const noexcept override { delete static_cast<Event*>(event); }
  bool queryStream(const c10::Stream& stream) const override { return streams().at(stream).idle(); }
  void synchronizeStream(const c10::Stream& stream) const override { wait_for(streams().at(stream)); }
  void synchronizeDevice(const c10::DeviceIndex device) const override {
    size_t count = streams().of[device].size();
    for (size_t id = 0; id < count; ++id) wait_for(*streams().of[device][id]);
  }
  void recordDataPtrOnStream(const c10::DataPtr&, const c10::Stream&) const override {}
};
C10_REGISTER_GUARD_IMPL(PrivateUse1, Guard);

// ---- memory --------------------------------------------------------------------------------------------------------

// What is freed is handed out again at once, as a caching allocator does it, and is overwritten before: whoever reads it
// on another stream without keeping it alive reads something else.
struct DeviceMemory final : public c10::Allocator {
  static std::map<size_t, std::vector<char*>>& spare() {
    static auto* one = new std::map<size_t, std::vector<char*>>();
    return *one;
  }
  static std::mutex& mutex() {
    static auto* one = new std::mutex();
    return *one;
  }
  static void free(void* pointer) {
    if (pointer == nullptr) return;
    char* begin = static_cast<char*>(pointer) - 64;
    size_t size = *reinterpret_cast<size_t*>(begin);
    std::memset(pointer, 0x5a, size);
    std::lock_guard<std::mutex> lock(mutex());
    spare()[size].push_back(begin);
  }
  c10::DataPtr allocate(size_t count) override {
    auto device = c10::Device(KIND, current_device);
    if (count == 0) return {nullptr, nullptr, &free, device};
    size_t size = (count + 511) / 512 * 512;
    char* begin = nullptr;
    {
      std::lock_guard<std::mutex> lock(mutex());
      auto& free_ones = spare()[size];
      if (!free_ones.empty()) {
        begin = free_ones.back();
        free_ones.pop_back();
      }
    }
    if (begin == nullptr) begin = static_cast<char*>(std::aligned_alloc(64, size + 64));
    *reinterpret_cast<size_t*>(begin) = size;
    return {begin + 64, begin + 64, &free, device};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &free; }
  void copy_data(void* to, const void* from, std::size_t count) const override { std::memcpy(to, from, count); }
};
DeviceMemory device_memory;

struct PinnedMemory final : public at::HostAllocator {
  static std::map<const char*, size_t>& all() {
    static auto* one = new std::map<const char*, size_t>();
    return *one;
  }
  static void free(void* pointer) {
    std::lock_guard<std::mutex> lock(gate().mutex);
    auto found = all().find(static_cast<char*>(pointer));
    if (found == all().end()) return;
    gate().pinned -= static_cast<long>(found->second);
    all().erase(found);
    std::free(pointer);
  }
  static bool has(const void* pointer) {
    std::lock_guard<std::mutex> lock(gate().mutex);
    auto next = all().upper_bound(static_cast<const char*>(pointer));
    if (next == all().begin()) return false;
    --next;
    return static_cast<const char*>(pointer) < next->first + next->second;
  }
  c10::DataPtr allocate(size_t count) override {
    std::lock_guard<std::mutex> lock(gate().mutex);
    TORCH_CHECK(
        gate().limit < 0 || gate().pinned + static_cast<long>(count) <= gate().limit,
        "simulated: no more memory can be pinned");
    auto* pointer = static_cast<char*>(std::aligned_alloc(64, (std::max<size_t>(count, 1) + 63) / 64 * 64));
    all()[pointer] = count;
    gate().pinned += static_cast<long>(count);
    return {pointer, pointer, &free, c10::Device(c10::DeviceType::CPU)};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &free; }
  void copy_data(void* to, const void* from, std::size_t count) const override { std::memcpy(to, from, count); }
  bool record_event(void*, void*, c10::Stream) override { return true; }
  void empty_cache() override {}
  at::HostStats get_stats() override { return {}; }
  void reset_accumulated_stats() override {}
  void reset_peak_stats() override {}
};
PinnedMemory pinned_memory;
at::HostAllocatorRegistry<KIND> host_allocator(&pinned_memory);

struct Hooks final : public at::PrivateUse1HooksInterface {
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  c10::DeviceIndex deviceCount() const override { return DEVICES; }
  void setCurrentDevice(c10::DeviceIndex device) const override { current_device = device; }
  c10::DeviceIndex getCurrentDevice() const override { return current_device; }
  c10::DeviceIndex exchangeDevice(c10::DeviceIndex device) const override { return std::exchange(current_device, device); }
  c10::DeviceIndex maybeExchangeDevice(c10::DeviceIndex device) const override { return exchangeDevice(device); }
  bool isPinnedPtr(const void* data) const override { return PinnedMemory::has(data); }
  c10::Allocator* getPinnedMemoryAllocator() const override { return &pinned_memory; }
  void resizePrivateUse1Bytes(const c10::Storage& storage, size_t size) const override {
    auto fresh = device_memory.allocate(size);
    if (storage.nbytes() > 0 && size > 0) {
      streams().at(on(storage.device().index())).drain();
      std::memcpy(fresh.get(), storage.data(), std::min(size, storage.nbytes()));
    }
    storage.set_data_ptr_noswap(std::move(fresh));
    storage.unsafeGetStorageImpl()->set_nbytes(size);
  }
};

// ---- operators -----------------------------------------------------------------------------------------------------

struct Here {  // the device of a tensor is the current one meanwhile
  c10::DeviceIndex before;
  explicit Here(c10::Device device) : before(current_device) {
    if (device.type() == KIND && device.has_index()) current_device = device.index();
  }
  ~Here() { current_device = before; }
};

constexpr c10::DispatchKeySet KEYS(c10::DispatchKey::PrivateUse1);

at::Tensor empty(
    at::IntArrayRef size, std::optional<at::ScalarType> dtype, std::optional<at::Layout>,
    std::optional<at::Device> device, std::optional<bool>, std::optional<at::MemoryFormat> format) {
  Here here(device.value_or(c10::Device(KIND, current_device)));
  return at::detail::empty_generic(size, &device_memory, KEYS, c10::dtype_or_default(dtype), format);
}

at::Tensor empty_strided(
    at::IntArrayRef size, at::IntArrayRef stride, std::optional<at::ScalarType> dtype, std::optional<at::Layout>,
    std::optional<at::Device> device, std::optional<bool>) {
  Here here(device.value_or(c10::Device(KIND, current_device)));
  return at::detail::empty_strided_generic(size, stride, &device_memory, KEYS, c10::dtype_or_default(dtype));
}

at::Tensor as_host(const at::Tensor& tensor) {  // the same memory
  if (!tensor.is_privateuseone()) return tensor;
  return at::from_blob(
      tensor.mutable_data_ptr(), tensor.sizes(), tensor.strides(), tensor.options().device(at::kCPU));
}

at::Tensor copy_from(const at::Tensor& from, const at::Tensor& to, bool non_blocking) {
  bool down = !to.is_privateuseone(), up = !from.is_privateuseone();
  auto& queue = streams().at(on(up ? to.device().index() : from.device().index()));
  bool plain = from.scalar_type() == to.scalar_type() && from.is_contiguous() && to.is_contiguous() &&
      from.sizes() == to.sizes() && from.is_conj() == to.is_conj() && from.is_neg() == to.is_neg();
  void* host = down ? to.mutable_data_ptr() : up ? from.mutable_data_ptr() : nullptr;
  bool apart = plain && non_blocking && (host == nullptr || PinnedMemory::has(host));
  if (!down && !up && from.device() != to.device()) apart = false;
  if (apart) {  // nobody keeps the memory alive here: as on real devices, that is the business of whoever copies
    auto *target = static_cast<char*>(to.mutable_data_ptr()), *source = static_cast<char*>(from.mutable_data_ptr());
    queue.add([target, source, count = to.nbytes(), down] {
      for (size_t at = 0; at < count; at += PIECE) {
        size_t size = std::min(PIECE, count - at);
        if (down) gate().pass(count);
        std::memcpy(target + at, source + at, size);
        if (down) {
          std::lock_guard<std::mutex> lock(gate().mutex);
          gate().copied += static_cast<long>(size);
        }
      }
    });
    return to;
  }
  wait_for(queue);
  if (down && !up) {
    std::lock_guard<std::mutex> lock(gate().mutex);
    gate().blocking += static_cast<long>(to.nbytes());
  }
  as_host(to).copy_(as_host(from));
  return to;
}

at::Tensor copy_from_and_resize(const at::Tensor& from, const at::Tensor& to) {
  if (to.sizes() != from.sizes()) at::native::resize_(to, from.sizes(), std::nullopt);
  return copy_from(from, to, false);
}

at::Scalar local_scalar(const at::Tensor& tensor) { return at::_local_scalar_dense(tensor.to(at::kCPU)); }

const at::Tensor& resize(const at::Tensor& self, at::IntArrayRef size, std::optional<at::MemoryFormat> format) {
  Here here(self.device());
  return at::native::resize_(self, size, format);
}

at::Tensor& set_storage(at::Tensor& self, at::Storage from, int64_t offset, at::IntArrayRef size, at::IntArrayRef stride) {
  return at::native::set_storage_cpu_(self, std::move(from), offset, size, stride);
}

void computed_by_the_host(const c10::OperatorHandle& op, torch::jit::Stack* stack) { at::native::cpu_fallback(op, stack); }

TORCH_LIBRARY_IMPL(aten, PrivateUse1, m) {
  m.impl("empty.memory_format", empty);
  m.impl("empty_strided", empty_strided);
  m.impl("as_strided", at::native::as_strided_tensorimpl);
  m.impl("view", at::native::view);
  m.impl("_reshape_alias", at::native::_reshape_alias);
  m.impl("resize_", resize);
  m.impl("set_.source_Storage_storage_offset", set_storage);
  m.impl("_copy_from", copy_from);
  m.impl("_copy_from_and_resize", copy_from_and_resize);
  m.impl("_local_scalar_dense", local_scalar);
}

TORCH_LIBRARY_IMPL(_, PrivateUse1, m) { m.fallback(torch::CppFunction::makeFromBoxedFunction<&computed_by_the_host>()); }

}  // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  c10::SetAllocator(KIND, &device_memory);
  at::RegisterPrivateUse1HooksInterface(new Hooks());
  m.def("device_count", [] { return DEVICES; });
  m.def("current_device", [] { return static_cast<int>(current_device); });
  m.def("hold", [](bool held, size_t least) {
    std::lock_guard<std::mutex> lock(gate().mutex);
    gate().held = held;
    gate().least = least;
    gate().changed.notify_all();
  });
  m.def("delay", [](int microseconds) {
    std::lock_guard<std::mutex> lock(gate().mutex);
    gate().delay = microseconds;
  });
  m.def("limit_pinned", [](long bytes) {
    std::lock_guard<std::mutex> lock(gate().mutex);
    gate().limit = bytes < 0 ? -1 : gate().pinned + bytes;
  });
  m.def("counts", [] {
    std::lock_guard<std::mutex> lock(gate().mutex);
    auto& g = gate();
    return std::map<std::string, long>{
        {"waiting", g.waiting}, {"copied", g.copied}, {"blocking", g.blocking}, {"syncs", g.syncs}, {"pinned", g.pinned}};
  });
}
