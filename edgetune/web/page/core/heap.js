// A fault of onnxruntime-web 1.19.2, the last version with training: reading and loading parameters puts a number on the
// module's stack and then frees it as if it were on the heap (wasm-training-core-impl.ts, `dimsOffset`), which
// damages the heap. Small models survive that for a while; with DeiT-Tiny the next session traps.

// The runtime's module factory, whose modules free nothing that is on their stack.
export function keepingTheStack(factory) {
  return async (options) => {
    const module = await factory(options);
    // Its first call puts the function itself in its place: what is put there before that would be lost.
    module._free(module._malloc(8));
    const { stackAlloc, _free: free } = module;
    const onStack = new Set(); // a few places, which come again and again
    module.stackAlloc = (size) => {
      const place = stackAlloc(size);
      onStack.add(place);
      return place;
    };
    module._free = (place) => {
      if (!onStack.has(place)) free(place);
    };
    return module;
  };
}
