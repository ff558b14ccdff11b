// Times each CUDA kernel alone on a GPU, with no torch in the process: all families that the GPU
// runs, and cuBLAS where a libcublas is found. Every round runs every case once, after the L2
// cache has been overwritten; times are medians of events on the stream.
//
//   cmake -S . -B build -DMEMEFF_CUDA=ON && cmake --build build --target bench_cuda_kernels
//   build/bench_cuda_kernels --shape 8192,4096,128256 --kernels grad_ --json times.json
//
// "of floor" is the time that FLOPs and bytes would take at the rates above the table, the larger of
// the two, as a share of the time taken. Exit status: 77 without a GPU.
#include <cuda_runtime_api.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <limits>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#include "cublas_product.h"
#include "cuda_cases.h"

namespace {

using namespace memeff;
using bench::Case;
using bench::Shape;

constexpr int kSkipped = 77;
constexpr size_t kCopyBytes = size_t{1} << 30;  // of the copy that measures memory

void require(cudaError_t error, const char* what) {
  if (error != cudaSuccess)
    throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(error));
}

struct Options {
  std::vector<Shape> shapes;
  std::string dtype;                  // "": bfloat16, float16 on GPUs without it
  std::vector<std::string> kernels;   // parts of their names; none: all
  std::vector<std::string> families;  // none: all
  int rounds = 10;
  double peak_tflops = 0, peak_gb_per_s = 0;  // 0: measured
  std::string json;
};

std::vector<std::string> split(const std::string& text) {
  std::vector<std::string> parts;
  std::istringstream stream(text);
  for (std::string part; std::getline(stream, part, ',');) parts.push_back(part);
  return parts;
}

[[noreturn]] void refuse(const std::string& message) {
  std::fprintf(stderr,
               "%s\nusage: bench_cuda_kernels [--shape N,D,V]... [--dtype bfloat16|float16] "
               "[--kernels PART,...] [--families NAME,...] [--rounds N] [--peak-tflops X] "
               "[--peak-gbs X] [--json PATH]\n",
               message.c_str());
  std::exit(2);
}

double positive(const std::string& option, const std::string& text) {
  char* end = nullptr;
  const double value = std::strtod(text.c_str(), &end);
  if (text.empty() || *end != '\0' || !(value > 0))
    refuse(option + " is '" + text + "': expected a positive number");
  return value;
}

Options parse(int count, char** arguments) {
  Options options;
  for (int i = 1; i < count; ++i) {
    const std::string name = arguments[i];
    if (name == "--help") refuse("Times each CUDA kernel alone.");
    if (i + 1 == count) refuse(name + ": expected a value behind it");
    const std::string value = arguments[++i];
    if (name == "--shape") {
      const std::vector<std::string> sizes = split(value);
      if (sizes.size() != 3) refuse("--shape is '" + value + "': expected N,D,V");
      int64_t numbers[3];
      for (int k = 0; k < 3; ++k)
        numbers[k] = static_cast<int64_t>(positive(name, sizes[static_cast<size_t>(k)]));
      options.shapes.push_back({numbers[0], numbers[1], numbers[2]});
    } else if (name == "--dtype") {
      if (value != "bfloat16" && value != "float16")
        refuse("--dtype is '" + value + "': expected bfloat16 or float16");
      options.dtype = value;
    } else if (name == "--kernels") {
      options.kernels = split(value);
    } else if (name == "--families") {
      options.families = split(value);
    } else if (name == "--rounds") {
      options.rounds = static_cast<int>(positive(name, value));
    } else if (name == "--peak-tflops") {
      options.peak_tflops = positive(name, value);
    } else if (name == "--peak-gbs") {
      options.peak_gb_per_s = positive(name, value);
    } else if (name == "--json") {
      options.json = value;
    } else {
      refuse("unknown option " + name);
    }
  }
  if (options.shapes.empty()) options.shapes = {{4096, 4096, 128256}, {8192, 4096, 128256}};
  return options;
}

class DeviceMemory : public bench::Memory {
 public:
  ~DeviceMemory() override {
    for (void* data : allocated_) cudaFree(data);
  }
  void* allocate(int64_t bytes, const char* name, int) override {
    void* data = nullptr;
    require(cudaMalloc(&data, static_cast<size_t>(bytes)), name);
    allocated_.push_back(data);
    return data;
  }
  void copy(void* to, const void* from, int64_t bytes) override {
    require(cudaMemcpyAsync(to, from, static_cast<size_t>(bytes), cudaMemcpyDefault, nullptr),
            "copy");
  }

 private:
  std::vector<void*> allocated_;
};

/// A pair of events around work on the default stream, and something larger than L2 to overwrite.
class Timer {
 public:
  explicit Timer(size_t flushed_bytes) : flushed_bytes_(flushed_bytes) {
    require(cudaEventCreate(&begin_), "event");
    require(cudaEventCreate(&end_), "event");
    require(cudaMalloc(&flushed_, flushed_bytes_), "memory for flushing L2");
  }
  ~Timer() {
    cudaEventDestroy(begin_), cudaEventDestroy(end_);
    cudaFree(flushed_);
  }
  Timer(const Timer&) = delete;

  template <class Work>
  double seconds(const Work& work) {
    require(cudaMemsetAsync(flushed_, 0, flushed_bytes_, nullptr), "flushing L2");
    require(cudaEventRecord(begin_, nullptr), "event");
    work();
    require(cudaEventRecord(end_, nullptr), "event");
    require(cudaEventSynchronize(end_), "a kernel");
    float milliseconds = 0;
    require(cudaEventElapsedTime(&milliseconds, begin_, end_), "event");
    return static_cast<double>(milliseconds) * 1e-3;
  }

 private:
  size_t flushed_bytes_;
  void* flushed_ = nullptr;
  cudaEvent_t begin_ = nullptr, end_ = nullptr;
};

struct Result {
  Case measured;
  std::vector<double> seconds;  // by round
  double median() const {
    std::vector<double> sorted = seconds;
    std::sort(sorted.begin(), sorted.end());
    return sorted[sorted.size() / 2];
  }
  double least() const { return *std::min_element(seconds.begin(), seconds.end()); }
};

/// What the GPU can sustain, and who says so.
struct Peaks {
  double flops = 0, bytes = 0;  // per second; no flops: unknown
  std::string flops_source, bytes_source;
};

double measured_bandwidth(Timer& timer) {
  DeviceMemory memory;
  const auto bytes = static_cast<int64_t>(kCopyBytes);
  void *from = memory.allocate(bytes, "source of the copy", 1),
       *to = memory.allocate(bytes, "target of the copy", 1);
  require(cudaMemset(from, 1, kCopyBytes), "memset");
  double best = std::numeric_limits<double>::infinity();
  for (int i = 0; i < 10; ++i)
    best = std::min(best, timer.seconds([&] { memory.copy(to, from, bytes); }));
  return 2.0 * static_cast<double>(kCopyBytes) / best;
}

/// The peak of dense 16-bit products with fp32 sums, from the data sheets; 0: not known here.
double datasheet_flops(const cudaDeviceProp& gpu) {
  const int capability = 10 * gpu.major + gpu.minor;
  const double per_cycle = capability == 75   ? 1024
                           : capability == 80 ? 2048
                           : capability == 90 ? 4096
                                              : 0;  // of a multiprocessor
  int kilohertz = 0;
  cudaDeviceGetAttribute(&kilohertz, cudaDevAttrClockRate, 0);
  return per_cycle * gpu.multiProcessorCount * kilohertz * 1e3;
}

Peaks find_peaks(const Options& options, const std::vector<Result>& results, double bandwidth,
                 const cudaDeviceProp& gpu) {
  Peaks peaks;
  peaks.bytes = options.peak_gb_per_s > 0 ? options.peak_gb_per_s * 1e9 : bandwidth;
  peaks.bytes_source = options.peak_gb_per_s > 0 ? "--peak-gbs" : "a copy of 1 GiB";
  if (options.peak_tflops > 0) {
    peaks.flops = options.peak_tflops * 1e12, peaks.flops_source = "--peak-tflops";
    return peaks;
  }
  for (const Result& result : results)
    if (result.measured.family == "cublas")
      peaks.flops = std::max(peaks.flops, result.measured.flops / result.median());
  peaks.flops_source = "the best product of cuBLAS";
  if (peaks.flops > 0) return peaks;
  peaks.flops = datasheet_flops(gpu);
  peaks.flops_source = peaks.flops > 0 ? "cycles and multiprocessors" : "unknown: --peak-tflops";
  return peaks;
}

double floor_seconds(const Case& measured, const Peaks& peaks) {
  const double products = peaks.flops > 0 ? measured.flops / peaks.flops : 0;
  return std::max(products, measured.bytes / peaks.bytes);
}

std::vector<Result> measure(std::vector<Case> cases, const Options& options, Timer& timer) {
  std::vector<Result> results;
  for (Case& one : cases) {
    const auto is_part = [&](const std::string& part) {
      return one.kernel.find(part) != std::string::npos;
    };
    const std::vector<std::string>&kernels = options.kernels, &families = options.families;
    const bool wanted =
        (kernels.empty() || std::any_of(kernels.begin(), kernels.end(), is_part)) &&
        (families.empty() || std::count(families.begin(), families.end(), one.family) > 0);
    if (wanted) results.push_back({std::move(one), {}});
  }
  constexpr int kWarmUpRounds = 2;
  for (int round = -kWarmUpRounds; round < options.rounds; ++round)
    for (Result& result : results) {
      if (round == -kWarmUpRounds) {  // so that one that hangs has been named
        const Case& next = result.measured;
        std::printf("%s, %s, %s\n", next.kernel.c_str(), next.family.c_str(), next.variant.c_str());
        std::fflush(stdout);
      }
      if (result.measured.prepare) result.measured.prepare();
      const double seconds = timer.seconds([&] {
        const Status status = result.measured.run();
        if (!status.ok())
          throw std::runtime_error(result.measured.kernel + " (" + result.measured.family + ", " +
                                   result.measured.variant + "): " + status.message);
      });
      if (round >= 0) result.seconds.push_back(seconds);
    }
  return results;
}

void print(const std::vector<Result>& results, const Peaks& peaks) {
  std::printf("peaks: %.0f TFLOP/s (%s), %.0f GB/s (%s)\n", peaks.flops * 1e-12,
              peaks.flops_source.c_str(), peaks.bytes * 1e-9, peaks.bytes_source.c_str());
  std::printf("%-20s %-8s %-36s %9s %9s %9s %8s %9s %9s %9s\n", "kernel", "family", "variant", "ms",
              "least", "GFLOP", "GB", "TFLOP/s", "GB/s", "of floor");
  for (const Result& result : results) {
    const Case& c = result.measured;
    const double seconds = result.median();
    std::printf("%-20s %-8s %-36s %9.4f %9.4f %9.0f %8.3f %9.1f %9.0f %7.1f %%\n", c.kernel.c_str(),
                c.family.c_str(), c.variant.c_str(), seconds * 1e3, result.least() * 1e3,
                c.flops * 1e-9, c.bytes * 1e-9, c.flops / seconds * 1e-12, c.bytes / seconds * 1e-9,
                100 * floor_seconds(c, peaks) / seconds);
  }
}

/// One shape of the JSON file. Names are plain ASCII without quotes.
std::string to_json(const Shape& shape, const std::string& dtype, const Peaks& peaks,
                    const std::vector<Result>& results) {
  std::ostringstream out;
  out.precision(9);
  out << "  {\"tokens\": " << shape.tokens << ", \"features\": " << shape.features
      << ", \"vocab\": " << shape.vocab << ", \"dtype\": \"" << dtype << "\",\n   \"peaks\": {"
      << "\"flops_per_s\": " << peaks.flops << ", \"flops_source\": \"" << peaks.flops_source
      << "\", \"bytes_per_s\": " << peaks.bytes << ", \"bytes_source\": \"" << peaks.bytes_source
      << "\"},\n   \"cases\": [";
  const char* separator = "\n";
  for (const Result& result : results) {
    const Case& c = result.measured;
    out << separator << "    {\"kernel\": \"" << c.kernel << "\", \"family\": \"" << c.family
        << "\", \"variant\": \"" << c.variant << "\", \"flops\": " << c.flops
        << ", \"bytes\": " << c.bytes << ", \"median_s\": " << result.median()
        << ", \"of_floor\": " << floor_seconds(c, peaks) / result.median() << ", \"seconds\": [";
    for (size_t i = 0; i < result.seconds.size(); ++i)
      out << (i == 0 ? "" : ", ") << result.seconds[i];
    out << "]}";
    separator = ",\n";
  }
  out << "]}";
  return out.str();
}

int run(const Options& options) {
  int count = 0;
  const cudaError_t error = cudaGetDeviceCount(&count);
  if (error != cudaSuccess || count == 0) {
    std::printf("SKIPPED: %s\n", error == cudaSuccess ? "no GPU" : cudaGetErrorString(error));
    return kSkipped;
  }
  cudaDeviceProp gpu;
  require(cudaGetDeviceProperties(&gpu, 0), "the GPU's properties");
  const int capability = 10 * gpu.major + gpu.minor;
  std::string reason;
  const bench::LibraryProduct cublas = bench::load_cublas(nullptr, &reason);
  std::printf("%s, sm_%d, %d multiprocessors, L2 %d MiB; cuBLAS: %s\n", gpu.name, capability,
              gpu.multiProcessorCount, gpu.l2CacheSize >> 20, cublas ? "yes" : reason.c_str());
  const std::string dtype = !options.dtype.empty() ? options.dtype
                            : capability >= 80     ? "bfloat16"
                                                   : "float16";
  Timer timer(static_cast<size_t>(std::max(gpu.l2CacheSize, 1 << 20)) * 2);
  const double bandwidth = options.peak_gb_per_s > 0 ? 0 : measured_bandwidth(timer);

  std::string shapes;
  // After every shape: whatever ends this program leaves what was measured.
  const auto write_json = [&] {
    if (options.json.empty()) return;
    std::ofstream file(options.json);
    file << "{\"gpu\": \"" << gpu.name << "\", \"capability\": " << capability
         << ", \"multiprocessors\": " << gpu.multiProcessorCount
         << ", \"rounds\": " << options.rounds << ", \"shapes\": [" << shapes << "]}\n";
    if (!file.good()) refuse("--json is '" + options.json + "': cannot be written");
  };
  bool failed = false;
  for (const Shape& shape : options.shapes) {
    std::printf("\nN=%lld D=%lld V=%lld %s\n", static_cast<long long>(shape.tokens),
                static_cast<long long>(shape.features), static_cast<long long>(shape.vocab),
                dtype.c_str());
    try {
      DeviceMemory memory;
      const std::vector<Result> results =
          measure(make_cases(shape, dtype == "bfloat16" ? DType::kBFloat16 : DType::kFloat16,
                             capability, memory, cublas, nullptr),
                  options, timer);
      const Peaks peaks = find_peaks(options, results, bandwidth, gpu);
      print(results, peaks);
      shapes += (shapes.empty() ? "\n" : ",\n") + to_json(shape, dtype, peaks, results);
      write_json();
    } catch (const std::runtime_error& problem) {
      std::printf("FAILED: %s\n", problem.what());
      cudaGetLastError();  // a lack of memory is no reason to fail again
      failed = true;
    }
    std::fflush(stdout);
  }
  return failed ? EXIT_FAILURE : EXIT_SUCCESS;
}

}  // namespace

int main(int count, char** arguments) {
  try {
    return run(parse(count, arguments));
  } catch (const std::runtime_error& problem) {
    std::fprintf(stderr, "FAILED: %s\n", problem.what());
    return EXIT_FAILURE;
  }
}
