// What tch does not offer, as C functions over libtorch.
//
// Contract of every function here: it never throws. It returns null on success, or an error text that
// stays valid until the next call on the same thread.
#include <ATen/Context.h>
#include <ATen/Functions.h>
#include <ATen/Version.h>
#include <ATen/autocast_mode.h>
#include <c10/core/GradMode.h>
#include <dlfcn.h>
#include <torch/csrc/autograd/engine.h>
#include <torch/csrc/autograd/function.h>
#include <torch/csrc/autograd/functions/utils.h>
#include <torch/csrc/autograd/variable.h>

#include <cstring>
#include <string>
#include <vector>

#include "guarded.h"

namespace {

// tch's `Tensor::as_ptr` is an `at::Tensor*`.
const at::Tensor& tensor(const void* handle) { return *static_cast<const at::Tensor*>(handle); }

void copy_text(const std::string& text, char* out, size_t capacity) {
  TORCH_CHECK(text.size() < capacity, "text of ", text.size(), " bytes does not fit ", capacity);
  std::memcpy(out, text.c_str(), text.size() + 1);
}

// Given the gradient of the output, assigns those of the inputs to `slots` by percheron_assign. 0 on success.
using Backward = int (*)(void* context, const void* gradient, void* slots, size_t count);
using Drop = void (*)(void* context);

// A step of the graph whose backward is the caller's. It owns `context`.
struct CallerNode : torch::autograd::Node {
  CallerNode(void* context, Backward backward, Drop drop) : context_(context), backward_(backward), drop_(drop) {}
  ~CallerNode() override { release_variables(); }

  void release_variables() override {
    if (context_ != nullptr) {
      drop_(context_);
      context_ = nullptr;
    }
  }

  torch::autograd::variable_list apply(torch::autograd::variable_list&& gradients) override {
    torch::autograd::variable_list result(num_outputs());
    if (!gradients[0].defined()) return result;
    TORCH_CHECK(context_ != nullptr, "backward through a graph that was freed");
    TORCH_CHECK(backward_(context_, &gradients[0], result.data(), result.size()) == 0,
                "a backward function of the caller panicked");
    return result;
  }

  std::string name() const override { return "CallerBackward"; }

 private:
  void* context_;
  Backward backward_;
  Drop drop_;
};

}  // namespace

extern "C" {

// Makes `output`, which was computed outside the graph, the result of `inputs`. Takes `context` in every
// case; without a graph it is dropped at once.
const char* percheron_attach(const void* output, const void* const* inputs, size_t count, void* context,
                             Backward backward, Drop drop) {
  return guarded([&] {
    auto node = std::shared_ptr<CallerNode>(new CallerNode(context, backward, drop), torch::autograd::deleteNode);
    torch::autograd::edge_list edges;
    bool wanted = false;
    for (size_t i = 0; i < count; ++i) {
      const auto& input = tensor(inputs[i]);
      wanted |= input.requires_grad();
      edges.push_back(torch::autograd::impl::gradient_edge(input));
    }
    if (!wanted || !c10::GradMode::is_enabled()) return;
    node->set_next_edges(std::move(edges));
    torch::autograd::set_history(tensor(output), node);
  });
}

// Puts a tensor into one of the slots that a Backward was given.
void percheron_assign(void* slots, size_t index, const void* value) {
  static_cast<at::Tensor*>(slots)[index] = tensor(value);
}

// Chooses algorithms whose result does not vary between runs.
const char* percheron_set_deterministic() {
  return guarded([&] {
    auto& context = at::globalContext();
    context.setDeterministicAlgorithms(true, /*warn_only=*/false);
    // Filling fresh memory with NaN finds reads of it, of which these networks have none.
    context.setDeterministicFillUninitializedMemory(false);
    context.setDeterministicCuDNN(true);
    context.setBenchmarkCuDNN(false);
    // Single precision is single precision on CUDA too.
    context.setAllowTF32CuDNN(false);
  });
}

// 1 if all the switches of percheron_set_deterministic are on.
const char* percheron_is_deterministic(int* out) {
  return guarded([&] {
    auto& context = at::globalContext();
    *out = context.deterministicAlgorithms() && !context.deterministicAlgorithmsWarnOnly() &&
           context.deterministicCuDNN() && !context.benchmarkCuDNN();
  });
}

// Autocast of this thread on the CPU or, if `cuda`, on CUDA: to bf16 if `kind` is 1, to f16 if it is
// 2, off if it is 0.
// Each weight is used once in a forward, so none is kept in its short form.
const char* percheron_autocast(int cuda, int kind) {
  return guarded([&] {
    const auto device = cuda ? at::kCUDA : at::kCPU;
    if (kind != 0) {
      at::autocast::set_autocast_dtype(device, kind == 1 ? at::kBFloat16 : at::kHalf);
      at::autocast::set_autocast_cache_enabled(false);
    }
    at::autocast::set_autocast_enabled(device, kind != 0);
  });
}

// The instruction set that ATen's kernels use on this processor.
const char* percheron_cpu_capability(char* out, size_t capacity) {
  return guarded([&] { copy_text(at::get_cpu_capability(), out, capacity); });
}

// What libtorch says about itself and its libraries: one fact a line, then the build settings.
const char* percheron_build_text(char* out, size_t capacity) {
  return guarded([&] { copy_text(at::show_config(), out, capacity); });
}

// The name of a CUDA device, from the driver that libtorch_cuda loaded.
const char* percheron_cuda_device(int ordinal, char* out, size_t capacity) {
  return guarded([&] {
    void* driver = dlopen("libcuda.so.1", RTLD_NOW);
    TORCH_CHECK(driver, "libcuda.so.1 cannot be loaded");
    auto init = reinterpret_cast<int (*)(unsigned)>(dlsym(driver, "cuInit"));
    auto get = reinterpret_cast<int (*)(int*, int)>(dlsym(driver, "cuDeviceGet"));
    auto get_name = reinterpret_cast<int (*)(char*, int, int)>(dlsym(driver, "cuDeviceGetName"));
    TORCH_CHECK(init && get && get_name, "libcuda.so.1 lacks a function");
    TORCH_CHECK(init(0) == 0, "the CUDA driver finds no GPU that this process may use");
    int device = 0;
    char name[256] = {0};
    TORCH_CHECK(get(&device, ordinal) == 0, "no CUDA device ", ordinal);
    TORCH_CHECK(get_name(name, sizeof name, device) == 0, "CUDA device ", ordinal, " has no name");
    copy_text(name, out, capacity);
  });
}

// Gradients of the scalar `loss` with respect to `leaves`, written one after the other into `flat`.
// A leaf that the loss does not depend on gives zeros. The graph is freed; no `.grad` is touched.
const char* percheron_gradients(const void* loss, const void* const* leaves, size_t count, const void* flat) {
  return guarded([&] {
    at::Tensor out = tensor(flat);
    TORCH_CHECK(out.dim() == 1 && out.is_contiguous(), "the flat gradient is not one contiguous row");
    TORCH_CHECK(!out.requires_grad(), "the flat gradient itself requires a gradient");
    int64_t total = 0;
    torch::autograd::edge_list inputs;
    inputs.reserve(count);
    for (size_t i = 0; i < count; ++i) {
      const auto& leaf = tensor(leaves[i]);
      TORCH_CHECK(leaf.requires_grad(), "leaf ", i, " does not require a gradient");
      inputs.push_back(torch::autograd::impl::gradient_edge(leaf));
      total += leaf.numel();
    }
    TORCH_CHECK(total == out.numel(), "the leaves have ", total, " elements, the flat gradient ", out.numel());

    auto gradients = torch::autograd::Engine::get_default_engine().execute(
        {torch::autograd::impl::gradient_edge(tensor(loss))}, {at::ones_like(tensor(loss))},
        /*keep_graph=*/false, /*create_graph=*/false, /*accumulate_grad=*/false, inputs);

    c10::NoGradGuard no_grad;
    if (!out.is_cpu()) {
      // A few launches for all of them, instead of one each.
      std::vector<at::Tensor> rows;
      rows.reserve(count);
      for (size_t i = 0; i < count; ++i) {
        const auto& leaf = tensor(leaves[i]);
        const auto gradient = gradients[i].defined() ? gradients[i] : at::zeros_like(leaf);
        TORCH_CHECK(gradient.numel() == leaf.numel(), "gradient ", i, " has another size than its leaf");
        rows.push_back(gradient.reshape(-1));
      }
      at::cat_out(out, rows);
      return;
    }
    const int64_t width = out.element_size();
    int64_t offset = 0;
    for (size_t i = 0; i < count; ++i) {
      const int64_t numel = tensor(leaves[i]).numel();
      const auto& gradient = gradients[i];
      if (!gradient.defined()) {
        out.narrow(0, offset, numel).zero_();
      } else if (out.is_cpu() && gradient.is_cpu() && gradient.is_contiguous() &&
                 gradient.scalar_type() == out.scalar_type()) {
        // One copy of bytes: a tensor operation for each of 700 leaves costs milliseconds.
        TORCH_CHECK(gradient.numel() == numel, "gradient ", i, " has another size than its leaf");
        std::memcpy(static_cast<char*>(out.mutable_data_ptr()) + offset * width, gradient.const_data_ptr(),
                    static_cast<size_t>(numel * width));
      } else {
        out.narrow(0, offset, numel).view(gradient.sizes()).copy_(gradient);
      }
      offset += numel;
    }
  });
}

}  // extern "C"
