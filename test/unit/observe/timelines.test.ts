import { expect, test } from 'vitest';
import { Timelines } from '../../../src/observe/timelines.ts';

test('the latest timelines are found by namespace and id, each by its latest container', () => {
  const timelines = new Timelines(2);
  const first = timelines.begin('default', 'c1');
  const other = timelines.begin('k8s.io', 'c1');
  expect(timelines.find('default', 'c1')).toBe(first);
  expect(timelines.find('k8s.io', 'c1')).toBe(other);
  expect(timelines.find('default', 'c2')).toBeUndefined();
  const again = timelines.begin('default', 'c1');
  expect(timelines.find('default', 'c1')).toBe(again);
  // The oldest by now.
  timelines.begin('default', 'c2');
  expect(timelines.find('k8s.io', 'c1')).toBeUndefined();
  expect(timelines.find('default', 'c1')).toBe(again);
});
