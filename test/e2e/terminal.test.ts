import { describe, expect, it } from 'vitest';
import { busyboxImage } from '../support/images.ts';
import { containerdBin, containerdVersions, runtime } from '../support/paths.ts';
import { Terminal } from '../support/terminal.ts';
import { useScene } from '../support/use-scene.ts';

describe.each(containerdVersions)('a terminal under containerd %s', (version) => {
  const scene = useScene({ version });

  function ctr(args: readonly string[], size: { columns: number; rows: number }): Terminal {
    const program = `${containerdBin(version)}/ctr`;
    const env = { CONTAINERD_ADDRESS: scene.containerd.address, CONTAINERD_NAMESPACE: 'default' };
    return new Terminal([program, ...args], { ...size, env, directory: scene.dir });
  }

  it('is one for the program in the guest: size, keys, job control, redrawing, and a second one by exec', async () => {
    const id = scene.id();
    const run = ['run', '--rm', '-t', '--runtime', runtime, '--fifo-dir', scene.fifoDir, '--env', 'PS1=[\\w] '];
    await using screen = ctr([...run, busyboxImage.name, id, 'sh'], { columns: 90, rows: 30 });
    await screen.waitFor(/^\[\/\]$/m);
    await screen.type('tty; stty size\r');
    await screen.waitFor(/^\/dev\/pts\/0\n30 90$/m);

    // The program inside learns of a new size while it runs.
    await screen.resize(70, 25);
    await screen.type('clear; stty size\r');
    await screen.waitFor(/^25 70$/m);

    // Ctrl-C ends the foreground program, not the shell; Ctrl-Z stops it; fg goes on with it. The program itself says
    // that it runs: before that a key would reach the shell, or its child between fork and exec, which both ignore it.
    await screen.type("clear; sh -c 'echo asleep; exec sleep 1000'\r");
    await screen.waitFor(/^asleep$/m);
    await screen.press('C-c');
    await screen.type('echo alive\r');
    await screen.waitFor(/^alive$/m);
    await screen.type("clear; sh -c 'echo copying; exec cat'\r");
    await screen.waitFor(/^copying$/m);
    await screen.press('C-z');
    await screen.waitFor(/Stopped/);
    await screen.type('jobs; fg\r');
    // Not before: the shell's own mode of the terminal does not make a line of it.
    await screen.waitFor(/^sh -c .*exec cat.?$/m);
    await screen.type('typed\r');
    await screen.waitFor(/^typed\ntyped$/m);
    await screen.press('C-d');
    await screen.type('echo back\r');
    await screen.waitFor(/^back$/m);

    // A program that draws the whole screen.
    await screen.type('clear; vi /tmp/note\r');
    await screen.waitFor(/^~$[\s\S]*note/m);
    await screen.type('ihello from vi');
    await screen.waitFor(/^I .*note/m);
    await screen.press('Escape');
    // What follows at once would be taken for the rest of an escape sequence.
    await screen.waitFor(/^- .*note/m);
    await screen.type(':wq\r');
    await screen.type('clear; cat /tmp/note\r');
    await screen.waitFor(/^hello from vi$/m);

    // Another terminal in the same container.
    const exec = ['task', 'exec', '-t', '--fifo-dir', scene.fifoDir, '--exec-id', 'second', id, 'sh'];
    await using second = ctr(exec, { columns: 60, rows: 20 });
    await second.waitFor(/^\[\/\]$/m);
    await second.type('tty; stty size; cat /tmp/note\r');
    await second.waitFor(/^\/dev\/pts\/1\n20 60\nhello from vi$/m);
    await second.type('exit 7\r');
    expect(await second.ended).toBe(0);

    await screen.type('exit\r');
    expect(await screen.ended).toBe(0);
    expect(await scene.tasks()).toEqual([]);
  });
});
