// Replays calls of the engine that engine_cases.py recorded and compares their results with the reference's.
//
//     engine_replay FILE     prints the instruction set and the number of cases; exit code 1 where a result differs
//
// The file, little-endian. A number is an int64. A list is a number n and n items; bytes are a number n and n bytes.
//
//     file      list of cases
//     case      bytes name, list of buffers, list of calls, list of results
//     buffer    number: size of an element; bytes: its content before the first call; list of numbers: where not
//               empty, the content is a weight, to be packed by qb_pack with these sizes
//     call      bytes: name of the function; list of arguments; number: what it returns (0: nothing)
//     argument  number: kind, then by kind
//                 INTEGER    number
//                 REAL       float64
//                 POINTER    number: index of a buffer, -1: null
//                 STRUCTURE  bytes, and a list of pointers in it, each two numbers: offset, index of a buffer
//     result    number: index of a buffer; bytes expected; number: 1 where it holds float32, which may differ by
//               float64: tolerance (0: the same bytes, as for all else)
#include <cinttypes>
#include <cmath>
#include <cstddef>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <functional>
#include <iterator>
#include <map>
#include <memory>
#include <string>
#include <type_traits>
#include <vector>

#include "engine.h"

namespace {

[[noreturn]] void fail(const std::string& reason) {
  std::fprintf(stderr, "engine_replay: %s\n", reason.c_str());
  std::exit(2);
}

// --- reading ---------------------------------------------------------------------------------------------------------

class Reader {
 public:
  explicit Reader(std::vector<char> data) : data_(std::move(data)) {}

  template <class T>
  T value() {
    T result;
    std::memcpy(&result, take(sizeof(T)), sizeof(T));
    return result;
  }
  int64_t number() { return value<int64_t>(); }
  std::vector<char> bytes() {
    const int64_t count = number();
    const char* from = take(count);
    return std::vector<char>(from, from + count);
  }
  std::string text() {
    const std::vector<char> read = bytes();
    return std::string(read.begin(), read.end());
  }
  template <class Item>
  auto list(Item item) {
    std::vector<decltype(item())> result;
    for (int64_t left = number(); left > 0; --left) result.push_back(item());
    return result;
  }
  bool ended() const { return at_ == data_.size(); }

 private:
  const char* take(int64_t count) {
    if (count < 0 || uint64_t(count) > data_.size() - at_) fail("the file is cut off");
    at_ += count;
    return data_.data() + at_ - count;
  }

  std::vector<char> data_;
  size_t at_ = 0;
};

enum Kind : int64_t { INTEGER, REAL, POINTER, STRUCTURE };

struct Argument {
  int64_t kind = INTEGER, integer = 0;
  double real = 0;
  std::vector<char> structure;
  struct Place {
    int64_t offset, buffer;
  };
  std::vector<Place> pointers;
};

struct Recorded {  // a buffer
  int64_t element;
  std::vector<char> content;
  std::vector<int64_t> packing;
};

struct Call {
  std::string function;
  std::vector<Argument> arguments;
  int64_t returned;
};

struct Result {
  int64_t buffer;
  std::vector<char> expected;
  int64_t is_float;
  double tolerance;
};

struct Case {
  std::string name;
  std::vector<Recorded> buffers;
  std::vector<Call> calls;
  std::vector<Result> results;
};

Argument read_argument(Reader& in) {
  Argument read;
  read.kind = in.number();
  if (read.kind == REAL) {
    read.real = in.value<double>();
  } else if (read.kind == STRUCTURE) {
    read.structure = in.bytes();
    read.pointers = in.list([&] {
      const int64_t offset = in.number();
      return Argument::Place{offset, in.number()};
    });
  } else {
    read.integer = in.number();
  }
  return read;
}

Case read_case(Reader& in) {
  Case read;
  read.name = in.text();
  read.buffers = in.list([&] {
    Recorded buffer;
    buffer.element = in.number();
    buffer.content = in.bytes();
    buffer.packing = in.list([&] { return in.number(); });
    return buffer;
  });
  read.calls = in.list([&] {
    Call call;
    call.function = in.text();
    call.arguments = in.list([&] { return read_argument(in); });
    call.returned = in.number();
    return call;
  });
  read.results = in.list([&] {
    Result result;
    result.buffer = in.number();
    result.expected = in.bytes();
    result.is_float = in.number();
    result.tolerance = in.value<double>();
    return result;
  });
  return read;
}

// --- calling ---------------------------------------------------------------------------------------------------------

// An argument as it is handed over; `size` is that of the structure that it points to, 0 where it is none.
struct Passed {
  int64_t kind, integer;
  double real;
  void* pointer;
  size_t size;
};

template <class T>
T as(const Passed& argument) {
  if constexpr (std::is_pointer_v<T>) {
    using Pointee = std::remove_cv_t<std::remove_pointer_t<T>>;
    if constexpr (std::is_class_v<Pointee>) {
      if (argument.kind != STRUCTURE || argument.size != sizeof(Pointee))
        fail("a structure of " + std::to_string(argument.size) + " bytes was recorded, engine.h has one of " +
             std::to_string(sizeof(Pointee)));
    } else if (argument.kind != POINTER) {
      fail("engine.h takes a pointer where something else was recorded");
    }
    return static_cast<T>(argument.pointer);
  } else if constexpr (std::is_floating_point_v<T>) {
    if (argument.kind != REAL) fail("engine.h takes a float where something else was recorded");
    return T(argument.real);
  } else {
    if (argument.kind != INTEGER) fail("engine.h takes an integer where something else was recorded");
    return T(argument.integer);
  }
}

using Function = std::function<int64_t(const std::vector<Passed>&)>;

template <class R, class... A, size_t... I>
int64_t spread(R (*function)(A...), const std::vector<Passed>& passed, std::index_sequence<I...>) {
  if (passed.size() != sizeof...(A)) fail("engine.h takes another number of arguments than was recorded");
  if constexpr (std::is_void_v<R>)
    return function(as<A>(passed[I])...), 0;
  else
    return function(as<A>(passed[I])...);
}

// A function of engine.h as one of a list of arguments: how each is converted follows from its declaration.
template <class R, class... A>
Function taking_list(R (*function)(A...)) {
  return [function](const std::vector<Passed>& passed) {
    return spread(function, passed, std::index_sequence_for<A...>());
  };
}

#define FUNCTION(name) {#name, taking_list(name)}
const std::map<std::string, Function> FUNCTIONS = {
    FUNCTION(qb_layer),          FUNCTION(qb_depthwise),
    FUNCTION(qb_transposed),     FUNCTION(qb_weight_only),
    FUNCTION(qb_lstm),           FUNCTION(qb_dynamic_lstm),
    FUNCTION(qb_weight_only_lstm), FUNCTION(qb_attention),
    FUNCTION(qb_probabilities),  FUNCTION(qb_weighted_values),
    FUNCTION(qb_layer_norm),     FUNCTION(qb_quantize),
    FUNCTION(qb_quantize_rows),  FUNCTION(qb_dequantize),
    FUNCTION(qb_add),            FUNCTION(qb_mul),
    FUNCTION(qb_table),          FUNCTION(qb_average),
    FUNCTION(qb_channel_affine), FUNCTION(qb_max_pool),
    FUNCTION(qb_weight_only_transposed), FUNCTION(qb_weight_only_depthwise),
};

// --- memory ----------------------------------------------------------------------------------------------------------

// The bytes of a tensor and none more, so that the sanitizer sees whatever lies beyond. Shifted by one element they are
// aligned as their elements are and no better: an activation may begin anywhere.
class Memory {
 public:
  Memory(size_t size, size_t alignment, size_t shift) {
    if (posix_memalign(&start_, alignment, size + shift)) fail("out of memory");
    data = static_cast<char*>(start_) + shift;
  }
  ~Memory() { std::free(start_); }
  Memory(const Memory&) = delete;
  Memory& operator=(const Memory&) = delete;

  char* data;

 private:
  void* start_ = nullptr;
};

constexpr size_t PACKED_ALIGNMENT = 64;  // of what torch allocates, where a packed weight lies

std::unique_ptr<Memory> packed(const Recorded& weight) {
  std::vector<Passed> sizes;
  for (const int64_t size : weight.packing) sizes.push_back({INTEGER, size, 0, nullptr, 0});
  const int64_t size = taking_list(qb_packed_size)(sizes);
  Memory plain(weight.content.size(), sizeof(void*), 0);
  std::memcpy(plain.data, weight.content.data(), weight.content.size());
  auto memory = std::make_unique<Memory>(size, PACKED_ALIGNMENT, 0);
  sizes.insert(sizes.begin(), {POINTER, 0, 0, plain.data, 0});
  sizes.push_back({POINTER, 0, 0, memory->data, 0});
  taking_list(qb_pack)(sizes);
  return memory;
}

std::unique_ptr<Memory> filled(const Recorded& buffer, bool shifted) {
  if (!buffer.packing.empty()) return packed(buffer);
  auto memory = std::make_unique<Memory>(buffer.content.size(), sizeof(void*), shifted ? buffer.element : 0);
  std::memcpy(memory->data, buffer.content.data(), buffer.content.size());
  return memory;
}

// --- comparing -------------------------------------------------------------------------------------------------------

// Where a result first differs, -1: nowhere.
int64_t first_difference(const Result& result, const char* got) {
  const int64_t element = result.is_float ? sizeof(float) : 1, count = result.expected.size() / element;
  for (int64_t i = 0; i < count; ++i) {
    const char *want_at = result.expected.data() + i * element, *got_at = got + i * element;
    if (!std::memcmp(want_at, got_at, element)) continue;
    if (!result.is_float) return i;
    float a, b;
    std::memcpy(&a, want_at, sizeof a);
    std::memcpy(&b, got_at, sizeof b);
    const bool close = result.tolerance > 0 && std::fabs(double(a) - double(b)) <= result.tolerance;
    if (!close && !(std::isnan(a) && std::isnan(b))) return i;
  }
  return -1;
}

// Whether a case gives what it should.
bool replay(const Case& recorded, bool shifted) {
  std::vector<std::unique_ptr<Memory>> buffers;
  for (const Recorded& buffer : recorded.buffers) buffers.push_back(filled(buffer, shifted));
  const auto address = [&](int64_t index) -> void* { return index < 0 ? nullptr : buffers.at(index)->data; };
  bool good = true;
  for (const Call& call : recorded.calls) {
    std::vector<Passed> passed;
    std::vector<std::unique_ptr<Memory>> structures;
    for (const Argument& argument : call.arguments) {
      Passed one{argument.kind, argument.integer, argument.real, nullptr, argument.structure.size()};
      if (argument.kind == POINTER) one.pointer = address(argument.integer);
      if (argument.kind == STRUCTURE) {
        structures.push_back(std::make_unique<Memory>(one.size, alignof(std::max_align_t), 0));
        one.pointer = structures.back()->data;
        std::memcpy(one.pointer, argument.structure.data(), one.size);
        for (const Argument::Place& place : argument.pointers) {
          void* target = address(place.buffer);
          std::memcpy(structures.back()->data + place.offset, &target, sizeof target);
        }
      }
      passed.push_back(one);
    }
    const auto function = FUNCTIONS.find(call.function);
    if (function == FUNCTIONS.end()) fail("engine_replay.cpp does not know " + call.function);
    const int64_t returned = function->second(passed);
    if (returned != call.returned) {
      std::fprintf(stderr, "%s: %s returned %" PRId64 ", not %" PRId64 "\n", recorded.name.c_str(),
                   call.function.c_str(), returned, call.returned);
      good = false;
    }
  }
  for (const Result& result : recorded.results) {
    const int64_t place = first_difference(result, static_cast<char*>(address(result.buffer)));
    if (place < 0) continue;
    std::fprintf(stderr, "%s: after %s, element %" PRId64 " differs\n", recorded.name.c_str(),
                 recorded.calls.back().function.c_str(), place);
    good = false;
  }
  return good;
}

}  // namespace

int main(int count, char** words) {
  if (count != 2) fail("give one file");
  std::ifstream file(words[1], std::ios::binary);
  if (!file) fail(std::string("cannot read ") + words[1]);
  Reader in(std::vector<char>(std::istreambuf_iterator<char>(file), {}));
  const std::vector<Case> cases = in.list([&] { return read_case(in); });
  if (!in.ended()) fail("the file goes on after its last case");
  int64_t bad = 0;
  for (const Case& recorded : cases)
    for (const bool shifted : {false, true}) bad += !replay(recorded, shifted);
  std::printf("%s: %zu cases, %" PRId64 " failures\n", qb_isa(), cases.size(), bad);
  return bad ? 1 : 0;
}
