// Transposed convolutions: the output pixels that the same taps reach form an ordinary convolution of stride 1.

namespace {

int64_t transposed(const Weight* weights, const Finish& finish, const Window* windows, const Rows& rows,
                   const Operands& operands, int64_t phases, int64_t taps) {
  for (int64_t phase = 0; phase < phases; ++phase) {
    const int64_t of_sample = windows[phase].out_height * windows[phase].out_width;
    const Rows by_phase{rows.zero_points, rows.scales, rows.pixels == INT64_MAX ? INT64_MAX : of_sample};
    layer(weights[phase], finish, windows[phase], by_phase, operands);
  }
  const Window& v = windows[0];
  return operands.samples * v.height * v.width * v.channels * taps * weights[0].outputs;
}

}  // namespace
