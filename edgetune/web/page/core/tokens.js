// ALaST's budgets of tokens, as edgetune/alast.py and edgetune/planner/tokens.py have them; which blocks train is the
// variant's. Without `adaptive` (a model whose tokens can't be pruned) every block sees all.

import { rounded } from "./preprocess.js";

export function allTokens(manifest) {
  return Array(manifest.shape.depth).fill(manifest.shape.patch_tokens);
}

export function initialBudgets(manifest, variant) {
  const { settings, token_floor: floors } = manifest.adaptive;
  const first = Math.min(1, Math.max(floors[variant.name], settings.initial_budget));
  return { budgets: Array(manifest.shape.depth).fill(first), lastDeltas: null };
}

// The budgets after a step with these class-token deltas (means over the batch, of every block).
export function moved(state, deltas, alpha, floor) {
  if (!deltas.every(Number.isFinite)) return state;
  const before = state.lastDeltas;
  const budgets = state.budgets.map((budget, block) =>
    before === null ? budget : Math.min(1, Math.max(floor, budget + alpha * (deltas[block] - before[block]))),
  );
  return { budgets, lastDeltas: [...deltas] };
}

// Patch tokens that enter each block: all up to the split, then a share of what is left; counts go up to a multiple.
export function tokensOf(state, manifest, variant) {
  const all = allTokens(manifest);
  if (manifest.adaptive === null || variant.split_block >= all.length) return all;
  const { settings, token_multiple: multiple, token_floor: floors } = manifest.adaptive;
  if (floors[variant.name] >= 1) return all;
  const asked = all.slice(0, variant.split_block + 1);
  const entering = asked.at(-1);
  for (const budget of state.budgets.slice(variant.split_block, -1)) {
    const base = settings.token_share === "compound" ? asked.at(-1) : entering;
    asked.push(Math.max(1, Math.min(asked.at(-1), rounded(base * budget))));
  }
  const tokens = [all[0]];
  for (const wanted of asked.slice(1)) {
    const up = multiple * Math.max(1, Math.ceil((wanted - 1e-9) / multiple));
    tokens.push(Math.max(1, Math.min(up, all[0], tokens.at(-1))));
  }
  return tokens;
}

// The share of patch tokens that the blocks above the split see.
export function keptShare(tokens, manifest, variant) {
  const above = tokens.slice(variant.split_block);
  if (above.length === 0) return 1;
  return above.reduce((sum, count) => sum + count, 0) / (above.length * manifest.shape.patch_tokens);
}
