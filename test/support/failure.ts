import { existsSync } from 'node:fs';
import { expect } from 'vitest';
import type { Scene } from './scene.ts';

export const hasKvm = existsSync('/sys/module/kvm_intel') || existsSync('/sys/module/kvm_amd');

/** Runs `true`, which must fail; what ctr said. Nothing may be left afterwards. */
export async function failure(scene: Scene, options: Parameters<Scene['run']>[2] = {}): Promise<string> {
  const result = await scene.run(scene.id('bad'), ['true'], options);
  expect(result.code).toBe(1);
  expect(result.stdout.toString()).toBe('');
  expect(await scene.tasks()).toEqual([]);
  await scene.assertNothingLeft();
  return result.stderr;
}
