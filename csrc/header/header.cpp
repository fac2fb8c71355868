#include "header/header.h"

#include <algorithm>
#include <stdexcept>
#include <tuple>
#include <unordered_set>

namespace {

constexpr size_t MAX_NAME = 1000;
constexpr size_t MAX_DIMENSIONS = 64;
constexpr int MAX_DIGITS = 18;  // every such number fits 63 bits

bool is_escape(char c) { return std::string_view("\"\\/bfnrt").find(c) != std::string_view::npos; }

struct NotPlain : std::runtime_error {
  using std::runtime_error::runtime_error;
};

class Reader {
 public:
  explicit Reader(std::string_view text) : text_(text) {}

  int64_t at() const { return int64_t(at_); }

  void skip_spaces() {
    while (at_ < text_.size() &&
           (text_[at_] == ' ' || text_[at_] == '\n' || text_[at_] == '\r' || text_[at_] == '\t'))
      at_++;
  }

  bool is_next(char c) {
    skip_spaces();
    if (at_ >= text_.size() || text_[at_] != c) return false;
    at_++;
    return true;
  }

  void require(char c) {
    if (!is_next(c)) throw NotPlain("unexpected character");
  }

  bool is_at_end() {
    skip_spaces();
    return at_ == text_.size();
  }

  // A string of printable ASCII, without escapes or with those of one letter.
  std::string_view plain_string(bool takes_escapes = false) {
    require('"');
    const size_t start = at_;
    while (at_ < text_.size() && text_[at_] != '"') {
      if (text_[at_] < ' ' || text_[at_] > '~') throw NotPlain("character");
      if (text_[at_] == '\\') {
        at_++;
        if (!takes_escapes || at_ == text_.size() || !is_escape(text_[at_])) throw NotPlain("\\");
      }
      at_++;
    }
    const std::string_view value = text_.substr(start, at_ - start);
    require('"');
    return value;
  }

  int64_t number() {
    skip_spaces();
    const size_t start = at_;
    int64_t value = 0;
    while (at_ < text_.size() && text_[at_] >= '0' && text_[at_] <= '9')
      if (int64_t(at_ - start) < MAX_DIGITS)
        value = value * 10 + (text_[at_++] - '0');
      else
        throw NotPlain("number");
    if (at_ == start || (text_[start] == '0' && at_ - start > 1)) throw NotPlain("number");
    return value;
  }

  std::vector<int64_t> numbers() {
    std::vector<int64_t> values;
    require('[');
    if (is_next(']')) return values;
    do {
      if (values.size() == MAX_DIMENSIONS) throw NotPlain("dimensions");
      values.push_back(number());
    } while (is_next(','));
    require(']');
    return values;
  }

 private:
  std::string_view text_;
  size_t at_ = 0;
};

void read_metadata(Reader& reader, size_t most) {
  std::unordered_set<std::string_view> keys;
  reader.require('{');
  if (reader.is_next('}')) return;
  do {
    if (!keys.insert(reader.plain_string()).second) throw NotPlain("repeated key");
    if (keys.size() > most) throw NotPlain("too many keys");
    reader.require(':');
    reader.plain_string(true);
  } while (reader.is_next(','));
  reader.require('}');
}

HeaderTensor read_tensor(Reader& reader, std::string_view name) {
  HeaderTensor tensor{.name = name, .dtype = {}, .shape = {}, .begin = -1, .end = -1};
  bool has_shape = false;
  reader.require('{');
  for (int i = 0; i < 3; i++) {
    if (i) reader.require(',');
    const std::string_view key = reader.plain_string();
    reader.require(':');
    if (key == "dtype" && tensor.dtype.empty()) {
      tensor.dtype = reader.plain_string();
    } else if (key == "shape" && !has_shape) {
      tensor.shape = reader.numbers();
      has_shape = true;
    } else if (key == "data_offsets" && tensor.begin < 0) {
      const std::vector<int64_t> offsets = reader.numbers();
      if (offsets.size() != 2) throw NotPlain("offsets");
      tensor.begin = offsets[0];
      tensor.end = offsets[1];
    } else {
      throw NotPlain("key");
    }
  }
  reader.require('}');
  if (tensor.dtype.empty() || tensor.end < tensor.begin) throw NotPlain("tensor");
  return tensor;
}

bool is_name(std::string_view name) { return !name.empty() && name.size() <= MAX_NAME; }

// Sorts tensors by their bytes; false where they overlap or leave a hole.
bool follow_each_other(std::vector<HeaderTensor>& tensors) {
  std::stable_sort(tensors.begin(), tensors.end(),
                   [](const HeaderTensor& a, const HeaderTensor& b) {
                     return std::tie(a.begin, a.end) < std::tie(b.begin, b.end);
                   });
  int64_t end = 0;
  for (const HeaderTensor& tensor : tensors) {
    if (tensor.begin != end) return false;
    end = tensor.end;
  }
  return true;
}

void read_all(Reader& reader, size_t most_tensors, Header& header) {
  std::unordered_set<std::string_view> names;
  reader.require('{');
  if (!reader.is_next('}')) {
    do {
      const std::string_view name = reader.plain_string();
      if (!is_name(name) || !names.insert(name).second) throw NotPlain("name");
      reader.require(':');
      if (name == "__metadata__") {
        read_metadata(reader, most_tensors);
        continue;
      }
      if (header.tensors.size() == most_tensors) {
        header.too_many = true;
        throw NotPlain("too many tensors");
      }
      header.tensors.push_back(read_tensor(reader, name));
    } while (reader.is_next(','));
    reader.require('}');
  }
  if (!reader.is_at_end()) throw NotPlain("text after the header");
}

}  // namespace

Header parse_header(std::string_view text, size_t most_tensors) {
  Header header;
  Reader reader(text);
  if (text.empty() || text[0] != '{') return Header{.tensors = {}, .error = 0};
  try {
    read_all(reader, most_tensors, header);
  } catch (const NotPlain&) {
    header.error = reader.at();
    return header;
  }
  if (!follow_each_other(header.tensors)) header.error = 0;
  return header;
}
