// What autograd asks of a device before backward, answered for a machine without a driver.
#include <ATen/detail/CUDAHooksInterface.h>

#include <cstddef>
#include <cstring>

static bool has_no_context(void*, signed char) { return false; }

// Lets the object behind at::detail::getCUDAHooks() say that no device has a context, where it would ask the driver and
// end the process. Its table of virtual functions is copied, the two entries before it included, and one is replaced.
extern "C" void answer_without_driver(void*** hooks) {
  bool (at::CUDAHooksInterface::*asked)(c10::DeviceIndex) const = &at::CUDAHooksInterface::hasPrimaryContext;
  std::ptrdiff_t offset;
  std::memcpy(&offset, &asked, sizeof(offset));  // in the ABI of GCC and Clang, 1 more than the offset in the table
  const std::size_t entries = 120;
  void** table = new void*[entries + 2];
  std::memcpy(table, *hooks - 2, (entries + 2) * sizeof(void*));
  table[2 + (offset - 1) / sizeof(void*)] = reinterpret_cast<void*>(&has_no_context);
  *hooks = table + 2;
}
