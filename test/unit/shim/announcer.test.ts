import { beforeEach, describe, expect, it } from 'vitest';
import { Announcer } from '../../../src/shim/announcer.ts';
import type { TaskEvent } from '../../../src/shim/topics.ts';

const event: TaskEvent = { type: 'TaskPaused', message: { containerId: 'c1' } };

let published: TaskEvent[];
let taken: (() => void)[];
let changes: number;
const options = {
  publish: (told: TaskEvent, onSent: () => void) => {
    published.push(told);
    taken.push(onSent);
  },
  onChange: () => {
    changes += 1;
  },
};
beforeEach(() => {
  published = [];
  taken = [];
  changes = 0;
});

describe('an event', () => {
  it('counts as sent when containerd has it, and is not sent again then', () => {
    const announcer = new Announcer(options);
    announcer.announce('start ', event);
    expect(published).toEqual([event]);
    expect([announcer.sent, announcer.due, changes]).toEqual([[], ['start '], 0]);
    announcer.announce('start ', event);
    expect(published.length).toBe(1);
    taken[0]?.();
    expect([announcer.sent, announcer.due, changes]).toEqual([['start '], [], 1]);
    announcer.announce('start ', event);
    expect(published.length).toBe(1);
    announcer.announce('exit ', event);
    expect(published.length).toBe(2);
  });

  it('that an earlier kilnd has sent is not sent again', () => {
    const announcer = new Announcer(options, ['create', 'start ']);
    announcer.announce('create', event);
    announcer.announce('start ', event);
    expect(published).toEqual([]);
    expect(announcer.sent).toEqual(['create', 'start ']);
  });

  it('whose name was forgotten is sent again', () => {
    const announcer = new Announcer(options, ['added e1', 'start e1', 'exit e1', 'start ']);
    announcer.forget('added e1', 'start e1', 'exit e1', 'never known');
    expect(announcer.sent).toEqual(['start ']);
    announcer.announce('start e1', event);
    expect(published).toEqual([event]);
  });

  it('whose name was forgotten on its way is sent again, and only the later one counts', () => {
    const announcer = new Announcer(options);
    announcer.announce('exit e1', event);
    announcer.forget('exit e1');
    announcer.announce('exit e1', event);
    expect(published.length).toBe(2);
    taken[0]?.();
    expect([announcer.sent, announcer.due]).toEqual([[], ['exit e1']]);
    taken[1]?.();
    expect([announcer.sent, announcer.due]).toEqual([['exit e1'], []]);
  });

  it('of a process whose name has passed to another by then does not count for that one', () => {
    const announcer = new Announcer(options);
    announcer.announce('exit e1', event);
    announcer.forget('exit e1');
    taken[0]?.();
    expect([announcer.sent, changes]).toEqual([[], 0]);
    announcer.announce('exit e1', event);
    expect(published.length).toBe(2);
  });
});
