// Attention as one operation: scores, softmax and the sum of values, a head of a sample at a time.

namespace {

inline int32_t dot(const int16_t* a, const int16_t* b, int64_t count) {
  int32_t sum = 0;
  for (int64_t i = 0; i < count; ++i) sum += int32_t(a[i]) * b[i];
  return sum;
}

// Scores of one query to e = exp(score - max), 0 where hidden; returns their sum.
inline float weigh(float* scores, int64_t keys) {
  float largest = -INFINITY;
  for (int64_t k = 0; k < keys; ++k) largest = scores[k] > largest ? scores[k] : largest;
  const float shift = largest > -INFINITY ? largest : 0.0f;
  for (int64_t k = 0; k < keys; ++k) {
    const float e = exponential(scores[k] - shift);
    scores[k] = scores[k] == -INFINITY ? 0.0f : e;
  }
  return lane_sum(scores, keys);
}

struct Heads {  // scratch of a thread for one head of a sample
  int16_t *keys, *values, *query, *probabilities;
  float* scores;

  explicit Heads(const Attention& a) {
    static thread_local Scratch k, v, q, p, s;
    keys = k.of<int16_t>(a.keys * a.depth);
    values = v.of<int16_t>(a.width * a.keys);
    query = q.of<int16_t>(a.depth);
    probabilities = p.of<int16_t>(a.keys);
    scores = s.of<float>(a.keys);
  }
};

inline void masked(const Attention& a, int64_t head, int64_t query, float* scores) {
  if (a.mask) {
    const float* mask = a.mask + (a.mask_shared ? 0 : head * a.queries * a.keys) + query * a.keys;
    for (int64_t k = 0; k < a.keys; ++k) scores[k] += mask[k];
  }
  if (a.causal)
    for (int64_t k = query + 1; k < a.keys; ++k) scores[k] = -INFINITY;
}

int64_t attention(const Attention& a, const uint8_t* q, const uint8_t* k, const uint8_t* v, uint8_t* y) {
  const Codes codes(a.zero_point, a.q_min, a.q_max);
  const int threads = threads_for(a.heads * a.queries * a.keys * (a.depth + a.width), WORTH_A_THREAD);
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
  for (int64_t head = 0; head < a.heads; ++head) {
    const Heads h(a);
    centre(k + head * a.keys * a.depth, a.keys * a.depth, int16_t(a.k_zero_point), h.keys);
    const uint8_t* values = v + head * a.keys * a.width;
    for (int64_t i = 0; i < a.keys; ++i)
      for (int64_t j = 0; j < a.width; ++j) h.values[j * a.keys + i] = int16_t(values[i * a.width + j] - a.v_zero_point);
    for (int64_t i = 0; i < a.queries; ++i) {
      centre(q + (head * a.queries + i) * a.depth, a.depth, int16_t(a.q_zero_point), h.query);
      for (int64_t j = 0; j < a.keys; ++j) h.scores[j] = float(dot(h.query, h.keys + j * a.depth, a.depth)) * a.m_scores;
      masked(a, head, i, h.scores);
      const float part = 255.0f / weigh(h.scores, a.keys);
      for (int64_t j = 0; j < a.keys; ++j) h.probabilities[j] = int16_t(rounded(h.scores[j] * part, 0.0f, 255.0f));
      uint8_t* out = y + (head * a.queries + i) * a.width;
      for (int64_t j = 0; j < a.width; ++j)
        out[j] = codes.of(float(dot(h.probabilities, h.values + j * a.keys, a.keys)) * a.m);
    }
  }
  return a.heads * a.queries * a.keys * (a.depth + a.width);
}

// The index of a row's scale: rows of a head may have one each, one together, or all heads one.
inline int64_t scale_of(int64_t head, int64_t row, int64_t rows, int32_t sharing) {
  return sharing == EACH_ROW ? head * rows + row : sharing == EACH_HEAD ? head : 0;
}

// p = e / sum, times the scale of each value where `value_scales` are given: float32 [heads][queries][keys].
int64_t probabilities(const Attention& a, const Quantized& q, const Quantized& k, const float* value_scales, float* y) {
  const int threads = threads_for(a.heads * a.queries * a.keys * a.depth, WORTH_A_THREAD);
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
  for (int64_t head = 0; head < a.heads; ++head) {
    const Heads h(a);
    for (int64_t j = 0; j < a.keys; ++j)
      centre(k.codes + (head * a.keys + j) * a.depth, a.depth,
             int16_t(k.zero_points[scale_of(head, j, a.keys, k.sharing)]), h.keys + j * a.depth);
    for (int64_t i = 0; i < a.queries; ++i) {
      const int64_t own = scale_of(head, i, a.queries, q.sharing);
      float* out = y + (head * a.queries + i) * a.keys;
      centre(q.codes + (head * a.queries + i) * a.depth, a.depth, int16_t(q.zero_points[own]), h.query);
      for (int64_t j = 0; j < a.keys; ++j) {
        const float m = q.scales[own] * k.scales[scale_of(head, j, a.keys, k.sharing)] * a.m_scores;
        out[j] = float(dot(h.query, h.keys + j * a.depth, a.depth)) * m;
      }
      masked(a, head, i, out);
      const float sum = std::max(weigh(out, a.keys), 1.0f);
      for (int64_t j = 0; j < a.keys; ++j) out[j] /= sum;
      if (value_scales)
        for (int64_t j = 0; j < a.keys; ++j) out[j] *= value_scales[head * a.keys + j];
    }
  }
  return a.heads * a.queries * a.keys * a.depth;
}

// f32(sum of p v) * (s_p * s_v): float32 [heads][queries][width]. Scales of v that lie in p already are null.
int64_t weighted_values(const Attention& a, const Quantized& p, const Quantized& v, float* y) {
  const int threads = threads_for(a.heads * a.queries * a.keys * a.width, WORTH_A_THREAD);
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
  for (int64_t head = 0; head < a.heads; ++head) {
    const Heads h(a);
    const uint8_t* values = v.codes + head * a.keys * a.width;
    for (int64_t i = 0; i < a.keys; ++i) {
      const int32_t zero = v.zero_points[scale_of(head, i, a.keys, v.sharing)];
      for (int64_t j = 0; j < a.width; ++j) h.values[j * a.keys + i] = int16_t(values[i * a.width + j] - zero);
    }
    for (int64_t i = 0; i < a.queries; ++i) {
      const int64_t own = scale_of(head, i, a.queries, p.sharing);
      centre(p.codes + (head * a.queries + i) * a.keys, a.keys, int16_t(p.zero_points[own]), h.probabilities);
      const float m = p.scales[own] * (v.scales ? v.scales[scale_of(head, 0, a.keys, v.sharing)] : 1.0f);
      float* out = y + (head * a.queries + i) * a.width;
      for (int64_t j = 0; j < a.width; ++j) out[j] = float(dot(h.probabilities, h.values + j * a.keys, a.keys)) * m;
    }
  }
  return a.heads * a.queries * a.keys * a.width;
}

}  // namespace
