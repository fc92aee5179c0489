// What the runtime takes for its module.

import factory from "./ort/ort-training-wasm-simd-threaded.mjs";
import { keepingTheStack } from "./core/heap.js";

export default keepingTheStack(factory);
