import { afterAll, afterEach, beforeAll, beforeEach } from 'vitest';
import { Scene, type SceneOptions } from './scene.ts';

/**
 * Sets a scene up before the first test of the enclosing `describe` and takes it down after the last. After every test
 * the machine is searched for leftovers, and what a failed test left is removed so that the next one starts clean.
 */
export function useScene(options: SceneOptions): Scene {
  const scene = new Scene(options);
  beforeAll(() => scene.setUp());
  afterAll(() => scene.tearDown());
  beforeEach(({ onTestFailed }) => {
    onTestFailed(async () => {
      process.stderr.write(`\n${await scene.logs()}\n`);
    });
  });
  afterEach(() => scene.checkClean());
  return scene;
}
