import { describe, expect, it } from 'vitest';
import { busyboxImage } from '../support/images.ts';
import { containerdBin, containerdVersions, runtime } from '../support/paths.ts';
import { Terminal } from '../support/terminal.ts';
import { useScene } from '../support/use-scene.ts';

/**
 * Not one that ends in the fifth column: busybox takes the terminal's "ESC [ 1 ; 5 R", the answer of `enter`'s question on
 * the first line, for the beginning of a key.
 */
const prompt = '[/]=>';

/**
 * Types a line at the shell's prompt, and Enter once it is there. With each prompt the shell asks the terminal where the
 * cursor is; an answer that came after Enter would be taken for input of the command.
 */
async function enter(screen: Terminal, line: string): Promise<void> {
  await screen.waitFor((text) => text.trimEnd().endsWith(`\n${prompt}`) || text.trimEnd() === prompt);
  await screen.type(line);
  await screen.waitFor((text) => text.trimEnd().endsWith(`${prompt}${line}`));
  await screen.press('Enter');
}

describe.each(containerdVersions)('a terminal under containerd %s', (version) => {
  const scene = useScene({ version });

  function ctr(args: readonly string[], size: { columns: number; rows: number }): Terminal {
    const program = `${containerdBin(version)}/ctr`;
    const env = { CONTAINERD_ADDRESS: scene.containerd.address, CONTAINERD_NAMESPACE: 'default' };
    return new Terminal([program, ...args], { ...size, env, directory: scene.dir });
  }

  it('is one for the program in the guest: size, keys, job control, redrawing, and a second one by exec', async () => {
    const id = scene.id();
    const run = ['run', '--rm', '-t', '--runtime', runtime, '--fifo-dir', scene.fifoDir, '--env', 'PS1=[\\w]=>'];
    await using screen = ctr([...run, busyboxImage.name, id, 'sh'], { columns: 90, rows: 30 });
    await enter(screen, 'tty; stty size');
    await screen.waitFor(/^\/dev\/pts\/0\n30 90$/m);

    // The program inside learns of a new size while it runs.
    await screen.resize(70, 25);
    await enter(screen, 'clear; stty size');
    await screen.waitFor(/^25 70$/m);

    // Ctrl-C ends the foreground program, not the shell; Ctrl-Z stops it; fg goes on with it. The program itself says
    // that it runs: before that a key would reach the shell, or its child between fork and exec, which both ignore it.
    await enter(screen, "clear; sh -c 'echo asleep; exec sleep 1000'");
    await screen.waitFor(/^asleep$/m);
    await screen.press('C-c');
    await enter(screen, 'echo alive');
    await screen.waitFor(/^alive$/m);
    await enter(screen, "clear; sh -c 'echo copying; exec cat'");
    await screen.waitFor(/^copying$/m);
    await screen.press('C-z');
    await screen.waitFor(/Stopped/);
    await enter(screen, 'jobs; fg');
    // Not before: the shell's own mode of the terminal does not make a line of it.
    await screen.waitFor(/^sh -c .*exec cat.?$/m);
    await screen.type('typed\r');
    await screen.waitFor(/^typed\ntyped$/m);
    await screen.press('C-d');
    await enter(screen, 'echo back');
    await screen.waitFor(/^back$/m);

    // A program that draws the whole screen.
    await enter(screen, 'clear; vi /tmp/note');
    await screen.waitFor(/^~$[\s\S]*note/m);
    await screen.type('ihello from vi');
    await screen.waitFor(/^I .*note/m);
    await screen.press('Escape');
    // What follows at once would be taken for the rest of an escape sequence.
    await screen.waitFor(/^- .*note/m);
    await screen.type(':wq\r');
    await enter(screen, 'clear; cat /tmp/note');
    await screen.waitFor(/^hello from vi$/m);

    // Another terminal in the same container.
    const exec = ['task', 'exec', '-t', '--fifo-dir', scene.fifoDir, '--exec-id', 'second', id, 'sh'];
    await using second = ctr(exec, { columns: 60, rows: 20 });
    await enter(second, 'tty; stty size; cat /tmp/note');
    await second.waitFor(/^\/dev\/pts\/1\n20 60\nhello from vi$/m);
    await second.type('exit 7\r');
    expect(await second.ended).toBe(0);

    await screen.type('exit\r');
    expect(await screen.ended).toBe(0);
    expect(await scene.tasks()).toEqual([]);
  });
});
