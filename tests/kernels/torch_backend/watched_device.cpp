// A device type with two devices, PrivateUse1, whose tensors lie in host memory. The operators of
// memeff_emulated run on it as far as the device: that refuses, and its error says which device was
// current then (tests/test_device_guard.py).
#include <ATen/ops/from_blob.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <c10/core/impl/alloc_cpu.h>
#include <torch/library.h>

#include <cstring>
#include <string>

#include "bindings/ops.h"

namespace memeff {
namespace {

constexpr auto kType = c10::DeviceType::PrivateUse1;
thread_local c10::DeviceIndex current_device = 0;

struct WatchedGuard final : c10::impl::DeviceGuardImplInterface {
  c10::DeviceType type() const override { return kType; }
  c10::Device getDevice() const override { return {kType, current_device}; }
  void setDevice(c10::Device device) const override { current_device = device.index(); }
  void uncheckedSetDevice(c10::Device device) const noexcept override {
    current_device = device.index();
  }
  c10::Device exchangeDevice(c10::Device device) const override {
    const c10::Device before = getDevice();
    setDevice(device);
    return before;
  }
  c10::Stream getStream(c10::Device device) const override {
    return c10::Stream(c10::Stream::DEFAULT, device);
  }
  c10::Stream exchangeStream(c10::Stream stream) const override { return stream; }
  c10::DeviceIndex deviceCount() const noexcept override { return 2; }
};

class WatchedDevice : public Device {
 public:
  static const Device& get() {
    static const WatchedDevice device;
    return device;
  }
  bool values_are_at_hand() const override { return false; }
  std::string plan(const Problem&, const PlanRequest&, Plan*) const override { return refusal(); }
  std::string run(const Problem&, const PlanRequest&, const at::Tensor&) const override {
    return refusal();
  }
  DeviceFacts facts(const Problem&) const override { return {0, refusal()}; }
  void scale(const at::Tensor&, const at::Tensor&, const at::Tensor&) const override {
    TORCH_CHECK_VALUE(false, refusal());
  }

 private:
  static std::string refusal() { return "current device " + std::to_string(current_device); }
};

at::Tensor empty(c10::SymIntArrayRef sizes, std::optional<at::ScalarType> dtype,
                 std::optional<at::Layout>, std::optional<at::Device> device, std::optional<bool>,
                 std::optional<at::MemoryFormat>) {
  const std::vector<int64_t> shape = C10_AS_INTARRAYREF_SLOW(sizes).vec();
  const at::ScalarType type = dtype.value_or(at::kFloat);
  size_t bytes = c10::elementSize(type);
  for (const int64_t size : shape) bytes *= static_cast<size_t>(size);
  void* const data = c10::alloc_cpu(bytes);
  const bool placed = device.has_value() && device->has_index();
  const at::Device place = placed ? *device : at::Device(kType, current_device);
  return at::from_blob(
      data, shape, [](void* memory) { c10::free_cpu(memory); },
      at::TensorOptions().dtype(type).device(place), place);
}

at::Tensor& zero(at::Tensor& tensor) {
  std::memset(tensor.mutable_data_ptr(), 0, tensor.nbytes());
  return tensor;
}

C10_REGISTER_GUARD_IMPL(PrivateUse1, WatchedGuard);

}  // namespace

TORCH_LIBRARY_IMPL(aten, PrivateUse1, m) {
  m.impl("empty.memory_format", &empty);
  m.impl("zero_", &zero);
}
TORCH_LIBRARY_IMPL(memeff_emulated, PrivateUse1, m) { implement_operators<WatchedDevice>(m); }

}  // namespace memeff
